"""A `system` column beside prompt and answers."""

import json
from pathlib import Path

from tests.outside.conftest import Run


def test_strings_are_refused_with_the_remedy(models: Path, case: Path, prefloop: Run) -> None:
    told = prefloop("check", "--model", models / "chatml", "--data", "rows.jsonl")
    assert told.code == 2
    assert "rows.jsonl:1: a `system` column beside a prompt that is a string" in told.err


def test_messages_begin_with_it(models: Path, case: Path, prefloop: Run) -> None:
    rows = [json.loads(line) for line in (case / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    (case / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("preference", "unpaired", "prompt"):
        told = prefloop(
            "check", "--model", models / "chatml", "--data", "chats.jsonl", "--kind", kind
        )
        assert told.code == 0, told.err
        assert "<|im_start|>system\\nYou are a ferryman who never leaves the river." in told.out
    rows[0]["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    (case / "twice.jsonl").write_text(json.dumps(rows[0]) + "\n")
    told = prefloop("check", "--model", models / "chatml", "--data", "twice.jsonl")
    assert (told.code, "twice.jsonl:1: two system texts" in told.err) == (2, True)


def test_sampled_rows_say_it_once(models: Path, case: Path, prefloop: Run) -> None:
    """The system text stands in the prompt then, and the rows are read again."""
    row = {"system": "Be brief.", "prompt": [{"role": "user", "content": "Hi"}]}
    (case / "p.jsonl").write_text(json.dumps(row) + "\n")
    short = ("--max-new-tokens", 4, "--max-length", 128, "--device", "cpu")
    for data, output in (("p.jsonl", "s.jsonl"), ("s.jsonl", "t.jsonl")):
        told = prefloop(
            "sample", "--model", models / "chatml", "--data", data, "--output", output, *short
        )
        assert told.code == 0, told.err
        found = json.loads((case / output).read_text())
        assert found["prompt"] == [{"role": "system", "content": "Be brief."}, *row["prompt"]]
