"""A few of the faults of `python -m tests.chaos`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_some_runs_that_are_disturbed_go_on_to_the_same_bits(tmp_path):
    words = [sys.executable, "-m", "tests.chaos", "--folder", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "--kills", "8", "--others", "1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = list(map(json.loads, (tmp_path / "trials.jsonl").read_text().splitlines()))
    faults = dict.fromkeys(("kill", "terminate", "disk", "damage"), 0)
    for row in rows:
        faults[row["kind"]] += len(row["faults"])
    assert faults["kill"] >= 8 and faults["terminate"] == faults["damage"] == 1
    assert faults["disk"] == (os.geteuid() == 0)
