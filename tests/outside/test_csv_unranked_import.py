"""Answers to be ranked, from a spreadsheet."""

import json
from pathlib import Path

import pytest

from tests.outside.conftest import Run


@pytest.mark.parametrize("name", ["unranked", "empty_tiers", "reasons", "ranked"])
def test_one_task_of_three_answers(name: str, case: Path, prefloop: Run) -> None:
    told = prefloop("label", "import", "--store", "a.db", "--data", f"{name}.csv")
    assert told.code == 0, told.err
    assert json.loads(told.out)["tasks"] == 1
    told = prefloop("label", "export", "--store", "a.db", "--output", "out.jsonl")
    if name in ("unranked", "empty_tiers"):
        assert (told.code, "nothing to use" in told.err) == (2, True)
        return
    row = json.loads((case / "out.jsonl").read_text())
    assert (row["completions"], row["tiers"]) == ([" Heron.", " Spoon.", " Wren."], [[0, 2], [1]])
    assert row.get("finish_reasons") == (["stop", "stop", "length"] if name == "reasons" else None)
