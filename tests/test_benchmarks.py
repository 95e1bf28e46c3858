"""The benchmarks' rows and turns, without their peers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.meter import MARK
from benchmarks.work import WORKS, Work, write_rows

from tests.training.small import write_world

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def words(text):
    return len(text.split())


def test_rows_have_the_wanted_lengths(tmp_path):
    work = Work("dpo", 5, (4, 12), (2, 10), 2)
    write_rows(work, ["a b c", "d e f g", "h i"], words, tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted(words(row["prompt"]) for row in rows) == [4, 6, 8, 10, 12]
    answers = [words(answer) for row in rows for answer in row["completions"]]
    assert sorted(answers) == [2 + 8 * i // 9 for i in range(10)]
    assert all(answer.startswith(" ") for row in rows for answer in row["completions"])


@pytest.mark.parametrize("name", ["sft", "reward-4", "dpo", "generate"])
def test_prefloops_side_takes_turns(name, world, tmp_path):
    """One turn and another: an answer each, with seconds, memory and a loss that falls."""
    work = WORKS[name]
    row = {"prompt": "a boat", "completions": [" the oath" + " in" * i for i in range(9)]}
    row["completions"] = row["completions"][: work.answers]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    policy, reference = str(world / "model"), str(world / "reference")
    command = [sys.executable, "-m", "benchmarks.prefloop_side", name, str(rows)]
    process = subprocess.Popen(
        [*command, policy, reference, "float32", "first"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    told, _ = process.communicate("turn\nturn\n", timeout=120)
    ready, first, second = (json.loads(x.removeprefix(MARK)) for x in told.splitlines())
    assert ready == {"ready": True}
    for turn in (first, second):
        assert turn["tokens"] > 0
        assert turn["cpu"] > 0
        assert turn["wall"] > 0
        assert turn["peak_gib"] > 0.05
    if name != "generate":
        assert second["loss"] < first["loss"]
