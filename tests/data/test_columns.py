"""Columns, keys of messages and cells as other tools write them: read, refused, or told."""

from __future__ import annotations

import datetime
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from prefloop.data.columns import carried, check_columns
from prefloop.data.formats import Kind, load, parse_row
from prefloop.data.messages import notes
from prefloop.errors import UserError
from prefloop.records import Conversation, Message, Prompt, Ranking, RowCounts, tools_of

U, A, B = (
    {"role": "user", "content": "u"},
    *({"role": "assistant", "content": text} for text in "ab"),
)
USER, GOOD, BAD = Message("user", "u"), Message("assistant", "a"), Message("assistant", "b")
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
CHATS = {"prompt": [U], "chosen": [A], "rejected": [B]}


def read(kind: Kind, row: dict[str, Any]) -> Any:
    (found,) = parse_row(row, "f:1", kind)
    return found


@pytest.mark.parametrize(
    "cell",
    [
        '[{"name": null, "role": "user", "content": "u"}]',
        '[{"weight": 1, "content": "u", "role": "user"}]',
        "({'id': 3, 'role': 'user', 'content': 'u'},)",
        "array([{'content': 'u', 'role': 'user'}], dtype=object)",
        "\n [\n{'from': 'human',\n 'value': 'u'}]",
        json.dumps(json.dumps([U])),
        '{"content": "u", "role": "user"}',
        "{'role': 'user', 'content': 'u'}",
        {"role": "user", "content": "u"},
        [{"role": "user", "content": "[{'type': 'text', 'text': 'u'}]"}],
        [{"role": "user", "content": [{"type": "input_text", "text": "u", "image_url": None}]}],
    ],
)
def test_messages_in_a_cell(cell: object) -> None:
    assert read("prompt", {"prompt": cell}).prompt == (USER,)


def test_numpy_puts_no_comma_and_a_content_may_look_like_the_gap() -> None:
    cell = "[{'role': 'user', 'content': 'if {a} {b}'} {'role': 'assistant', 'content': 'a'}]"
    found = read("demonstration", {"messages": cell})
    assert found == Conversation((Message("user", "if {a} {b}"), GOOD))


@pytest.mark.parametrize(
    "answer",
    ['{"role": "editor", "content": "x"}', '{"role": role, "content": text}', '[{"a": 1}]', "[1]"],
)
def test_an_answer_that_is_json_or_code_stays_text(answer: str) -> None:
    assert read("demonstration", {"prompt": "p", "completion": answer}).completion == answer


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "[{'role': 'user', 'content': 'u'}, 'and so on']"}, "looks like a list of"),
        ({"prompt": [{"role": "user", "content": []}]}, r"`prompt\[0\]\.content` is an empty list"),
        (
            {
                "prompt": [
                    {"role": "user", "content": [{"type": "text", "text": "u", "image": "x"}]}
                ]
            },
            r"`prompt\[0\]\.content\[0\]` is a part of type image;",
        ),
        ({"prompt": [{**U, "attachments": ["a.pdf"]}]}, r"`prompt\[0\]\.attachments` cannot be"),
        ({"prompt": [{**U, "image_url": "a.png"}]}, r"`prompt\[0\]\.image_url` cannot be"),
        ({"prompt": [{**U, "role": "tool_call"}]}, r"`prompt\[0\]\.role` is 'tool_call'"),
        ({"prompt": "p", "image_path": "a.png"}, "column `image_path` cannot be used"),
        ({"prompt": "p", "img": "a.png"}, "column `img` cannot be used"),
        ({"prompt": "p", "Video_URL": "a"}, "column `Video_URL` cannot be used"),
        ({"prompt": "p", "tool_definitions": [{"name": "x"}]}, "`tool_definitions` cannot be used"),
        ({"prompt": "p", "System": "Be brief."}, "column `System`; did you mean `system`"),
        ({"prompt": "p", "System Prompt": "Be brief."}, "did you mean `system_prompt`"),
        ({"prompt": "p", "system_instruction": "Be brief."}, "a prompt that is a string"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_line(row: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^f:1: .*{told}"):
        parse_row(row, "f:1", "prompt")


@pytest.mark.parametrize("value", [None, "", " ", "[]", "{}", [], [None], {"bytes": None}])
def test_what_holds_nothing_is_no_reason_to_refuse(value: object) -> None:
    for name in ("images", "functions", "history", "tools", "system"):
        assert isinstance(read("preference", {**PAIR, name: value}), Ranking)
    assert read("prompt", {"prompt": [{**U, "tool_calls": value, "images": value}]}) == Prompt(
        (USER,)
    )


@pytest.mark.parametrize("name", ["weight", "sample_weight", "loss_weight"])
def test_rows_weigh_the_same(name: str) -> None:
    check_columns({**PAIR, name: 1.0}, "preference", "f:1")
    check_columns({"prompt": "p", name: 70}, "prompt", "f:1")  # of whatever the prompt is about
    with pytest.raises(UserError, match=f"f:1: column `{name}` cannot be used: all rows weigh"):
        parse_row({**PAIR, name: 0}, "f:1", "preference")


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstration", {"prompt": [U], "completion": [{**A, "weight": 0}]}),
        ("preference", {**CHATS, "rejected": [{**B, "train": False}]}),
        ("preference", {"chosen": [U, {**A, "masked": True}], "rejected": [U, B]}),
    ],
)
def test_an_answer_kept_out_of_the_loss_is_no_answer(kind: Kind, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"f:1: a flag keeps `\w+` out of the loss"):
        parse_row(row, "f:1", kind)


@pytest.mark.parametrize("role", ["function", "tool_response", "Observation"])
def test_tools_speak_under_other_names(role: str) -> None:
    row = {"messages": [U, A, {"role": role, "content": "2"}, B]}
    assert read("demonstration", row).messages[2] == Message("tool", "2")
    assert f"role `{role}` read as tool" in notes(row, "demonstration")
    assert f"role `{role}` read as tool" in notes(
        {"messages": json.dumps(row["messages"])}, "demonstration"
    )


def test_tools_lose_the_nulls_of_a_table() -> None:
    tool = {"type": "function", "function": {"name": "t", "strict": None, "enum": [None]}}
    for given in ([tool], json.dumps([tool]), repr([tool])):
        found = read("prompt", {"prompt": [U], "tools": given})
        assert tools_of(found.prompt) == [
            {"type": "function", "function": {"name": "t", "enum": [None]}}
        ]


def test_what_a_kind_does_not_use_is_noted_once_a_row(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "a", "label": False, "score_chosen": 3, "id": None}
    assert notes(row, "demonstration") == {
        "column `label` not used",
        "column `score_chosen` not used",
    }
    assert notes({**PAIR, "messages": [U, A], "margin": 1.0}, "preference") == {
        "column `messages` not used"
    }
    assert notes({**PAIR, "margin": 1.0}, "unpaired") == {"column `margin` not used"}
    assert notes({"prompt": "p", "response": "r", "chosen_score": 1, "topic": "t"}, "prompt") == {
        "column `response` carried along, not taken for an answer",
        "column `chosen_score` not used",
        "column `topic` carried along",
    }
    messages = [{**U, "train": True}, {**A, "name": "x"}, U, {**B, "name": "y"}, U]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    load(str(tmp_path / "a.jsonl"), "demonstration", counts := RowCounts())
    assert counts.noted == {
        "`train` of a turn that is no answer not used: answers alone are trained": 1,
        "messages' key `name` not used": 1,
        "turns after the last answer not used": 1,
    }


# --- pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["u", " u\n", "v", None])
def test_lists_that_differ_early_are_dropped_whatever_prompt_stands_beside(
    prompt: str | None,
) -> None:
    last = {"role": "user", "content": "v"}
    row = {"prompt": prompt, "chosen": [U, A, last, A], "rejected": [U, B, last, B]}
    for better, worse in ((row["chosen"], row["rejected"]), ([U, A], row["rejected"])):
        if prompt == "v" and better == [U, A]:
            continue  # it asks what one of the sides was never asked
        found = read("preference", {**row, "chosen": better, "rejected": worse})
        assert found == "conversations that differ before the last answer"


def test_an_empty_answer_is_dropped_in_either_form() -> None:
    start = "\n\nHuman: u\n\nAssistant:"
    empty = {"role": "assistant", "content": " "}
    assert read("preference", {"chosen": [U, A], "rejected": [U, empty]}) == (
        "conversation with an empty answer"
    )
    assert read("preference", {"chosen": start + " a", "rejected": start}) == (
        "transcript with an empty answer"
    )


def test_transcripts_that_say_their_prompt_again() -> None:
    start = "\n\nHuman: u\n\nAssistant:"
    found = read("preference", {"prompt": start, "chosen": start + " a", "rejected": start + " b"})
    assert (found.prompt, found.completions) == (start, (" a", " b"))


def test_an_implicit_prompt_asks_too() -> None:
    row = {"chosen": [U, A, A], "rejected": [U, A, B]}
    with pytest.raises(UserError, match="`prompt` ends with an assistant message"):
        parse_row(row, "f:1", "preference")


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["\ud83d", {"a": ["\udc00"]}, object(), {1, 2}, b"x"])
def test_what_json_cannot_hold_is_told_before_the_work(value: object) -> None:
    with pytest.raises(UserError, match=r"f:1: column `x` holds .*, which a row of JSON cannot"):
        carried({"x": value}, "f:1")


def test_former_answers_go_under_many_names() -> None:
    row = {"score_chosen": 1, "rejected_model": "m", "chosen-by": "me", "topic": "t", "tiers": []}
    assert carried(row, "f:1") == {"topic": "t"}


@pytest.mark.skipif(find_spec("pandas") is not None, reason="pandas can hold it")
def test_a_time_too_fine_for_python_is_told(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    times = {"prompt": ["p"], "at": arrow.array([1], arrow.duration("ns"))}
    parquet.write_table(arrow.table(times), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: malformed Parquet after row 0 \("):
        load(str(tmp_path / "a.parquet"), "prompt", RowCounts())


def test_values_of_tables_become_json(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    day = datetime.date(2024, 2, 3)
    row = {"prompt": "p", "made": {"on": [day], "took": datetime.timedelta(seconds=5)}}
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (found,) = load(str(tmp_path / "a.parquet"), "prompt", RowCounts())
    assert found.extra == {"made": {"on": ["2024-02-03"], "took": "0:00:05"}}
