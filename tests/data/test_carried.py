"""What goes along with new answers to a row's prompt, and what is told."""

from __future__ import annotations

import datetime
from decimal import Decimal
from typing import Any

import pytest

from prefloop.data.columns import answered, carried, like_answers, of_answers
from prefloop.data.messages import notes
from prefloop.errors import UserError


@pytest.mark.parametrize(
    "name",
    "completion chosen rejected completions messages conversations tiers label margin judged "
    "scores priority chosen_ids finish_reasons score_chosen chosen-rating rejected_2".split(),
)
def test_what_speaks_of_former_answers_stays_behind(name: str) -> None:
    assert of_answers(name)
    assert carried({name: 1, "topic": "birds"}, "r:1") == {"topic": "birds"}


@pytest.mark.parametrize("name", ["response", "response_a", "answers", "model-output", "answer2"])
def test_other_names_of_answers_go_along_and_are_no_prompt_alone(name: str) -> None:
    assert like_answers(name)
    assert answered({"prompt": "p", name: "x"})
    assert not answered({"prompt": "p", name: None})
    assert carried({name: "x"}, "r:1") == {name: "x"}


@pytest.mark.parametrize("name", ["topic", "model", "seed", "label", "unanswered"])
def test_other_columns_leave_a_prompt_a_prompt(name: str) -> None:
    assert not answered({"prompt": "p", name: "x"})


def test_values_become_what_json_holds() -> None:
    row: dict[str, Any] = {"d": datetime.date(2026, 1, 2), "n": [float("inf"), Decimal("1.50")]}
    assert carried(row, "r:1") == {"d": "2026-01-02", "n": [None, "1.50"]}


@pytest.mark.parametrize(
    "value", [b"x", [{"a": b"x"}], "half \ud83d", {"half \ud83d": 1}, {1, 2}, object(), {(1, 2): 3}]
)
def test_values_that_json_lacks_are_told_with_their_column(value: object) -> None:
    with pytest.raises(UserError, match=r"^r:1: column `x` holds "):
        carried({"x": value}, "r:1")


def test_ids_that_nobody_can_read_are_noted() -> None:
    told = "column `completion_ids` not used: no `tokenizer` says whose tokens they are"
    assert told in list(notes({"prompt": "p", "completion_ids": [[1]]}, "prompt"))
    assert told not in list(
        notes({"completion_ids": [[1]], "tokenizer": "0123456789abcdef"}, "prompt")
    )
