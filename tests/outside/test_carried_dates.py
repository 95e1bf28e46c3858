"""Columns beside the prompt that JSON has no word for."""

import json
from pathlib import Path

import pyarrow as arrow
import pytest
from pyarrow import parquet

from tests.outside.conftest import Run

SHORT = ("--max-new-tokens", 4, "--max-length", 64, "--device", "cpu")


@pytest.mark.parametrize("name", ["dates", "decimal"])
def test_they_are_carried_as_text(name: str, models: Path, case: Path, prefloop: Run) -> None:
    data = ("--data", f"{name}.parquet")
    for command, more in (("sample", ("--samples-per-prompt", 2)), ("generate", ())):
        told = prefloop(
            command, "--model", models / "plain", *data, "--output", "o.jsonl", *more, *SHORT
        )
        assert told.code == 0, told.err
        rows = [json.loads(line) for line in (case / "o.jsonl").read_text().splitlines()]
        assert all(isinstance(v, str) for row in rows for k, v in row.items() if k == name[:4])
    told = prefloop("label", "import", "--store", "s.db", *data)
    assert told.code == 0, told.err


def test_bytes_are_refused_before_the_first_answer(models: Path, case: Path, prefloop: Run) -> None:
    told = prefloop(
        *("sample", "--model", "nowhere", "--data", "bytes.parquet", "--output", "o.jsonl"), *SHORT
    )
    assert told.code == 2
    assert "bytes.parquet:1: column `" in told.err
    assert "holds bytes" in told.err
    told = prefloop("label", "import", "--store", "s.db", "--data", "bytes.parquet")
    assert (told.code, "holds bytes" in told.err) == (2, True)


def test_not_a_number_becomes_null(models: Path, case: Path, prefloop: Run) -> None:
    table = arrow.table({"prompt": ["a", "b"], "x": [float("nan"), 1.5]})
    parquet.write_table(table, case / "nan.parquet")
    told = prefloop(
        *("sample", "--model", models / "plain", "--data", "nan.parquet", "--output", "o.jsonl"),
        *SHORT,
    )
    assert told.code == 0, told.err
    rows = [json.loads(line) for line in (case / "o.jsonl").read_text().splitlines()]
    assert [row["x"] for row in rows] == [None, 1.5]
