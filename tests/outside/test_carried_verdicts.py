"""New answers to prompts of a set that was judged: nothing of the former verdict goes along."""

import json
from pathlib import Path

import pytest

from tests.outside.conftest import Run


def test_the_new_rows_wait_for_a_labeller(models: Path, case: Path, prefloop: Run) -> None:
    told = prefloop(
        *("sample", "--model", models / "plain", "--data", "judged_before.jsonl"),
        *("--output", "new.jsonl", "--samples-per-prompt", 2, "--max-new-tokens", 4),
        *("--max-length", 64, "--device", "cpu"),
    )
    assert told.code == 0, told.err
    row = json.loads((case / "new.jsonl").read_text())
    assert row["topic"] == "birds"
    former = {"chosen", "rejected", "margin", "completion", "scores", "judged", "priority"}
    assert not former & row.keys()
    told = prefloop("check", "--model", models / "plain", "--data", "new.jsonl")
    assert (told.code, "preference rows need" in told.err) == (2, True)
    told = prefloop("label", "import", "--store", "s.db", "--data", "new.jsonl")
    assert told.code == 0, told.err
    told = prefloop("label", "export", "--store", "s.db", "--output", "out.jsonl")
    assert (told.code, "nothing to use" in told.err) == (2, True)


def test_generate_too(models: Path, case: Path, prefloop: Run) -> None:
    told = prefloop(
        *("generate", "--model", models / "plain", "--data", "judged_before.jsonl"),
        *("--output", "g.jsonl", "--max-new-tokens", 4, "--max-length", 64, "--device", "cpu"),
    )
    assert told.code == 0, told.err
    row = json.loads((case / "g.jsonl").read_text())
    assert row["completion"] != " Heron."
    assert not {"chosen", "rejected", "margin", "scores", "judged", "priority"} & row.keys()


def test_it_is_told_what_stays_behind(models: Path, case: Path, prefloop: Run) -> None:
    row = {"prompt": "p", "score_chosen": 3, "response": "old", "messages": [], "topic": "birds"}
    (case / "rows.jsonl").write_text(json.dumps(row) + "\n")
    told = prefloop(
        *("generate", "--model", models / "plain", "--data", "rows.jsonl", "--output", "g.jsonl"),
        *("--max-new-tokens", 4, "--max-length", 64, "--device", "cpu"),
    )
    assert told.code == 0, told.err
    assert "of former answers, not carried along: score_chosen (1 rows), messages" in told.err
    assert "carried along, answers by name: response (1 rows)" in told.err
    new = json.loads((case / "g.jsonl").read_text())
    assert (new["topic"], new["response"]) == ("birds", "old")
    assert not {"score_chosen", "messages"} & new.keys()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "response_a": "x", "response_b": "y"},
        {"prompt": "p", "outputs": ["x", "y"]},
        {"prompt": "p", "score_chosen": 1.0},
        {"prompt": "p", "judged": [{"labeller": "ann", "tiers": [[0], [1]]}]},
        {"prompt": "p", "completion": "x"},
    ],
)
def test_a_row_that_fits_no_form_is_refused(row: object, case: Path, prefloop: Run) -> None:
    (case / "rows.jsonl").write_text(json.dumps(row) + "\n")
    told = prefloop("label", "import", "--store", "s.db", "--data", "rows.jsonl")
    assert (told.code, "rows.jsonl:1: columns `prompt`" in told.err) == (2, True), told.err
