"""Where one of two ranks comes to an end, the other says which and why, and nothing is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefloop.runs import newest_checkpoint
from prefloop.training.step import first_of
from tests.ranks import on_ranks

ROOT = Path(__file__).parents[2]
ENDS = {  # how the second rank ends; what the first says, the step that is kept
    "memory": (
        "rank 1 failed: out of memory (Tried to allocate 2.00 GiB); lower --micro-",
        "step-2",
    ),
    "killed": ("lost rank 1 without a word: killed, perhaps for memory", "step-2"),
    "hangs": ("rank 1 did not come to what the others waited for: it hangs", "step-2"),
    "nan": ("step 3: the loss is nan, for that of rank 1; nothing was saved over the start", None),
    "gradient": ("and the gradient norm nan, for that of rank 1; nothing was saved over the", None),
    "gradient-of-slices": ("and the gradient norm nan, for that of rank 1; nothing was", None),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ENDS)
def test_a_rank_that_ends_is_named_by_the_first(how, world, tmp_path):
    told, step = ENDS[how]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    ranks = ["--nproc-per-node", "2", "-m", "tests.training.end_on_rank"]
    done = subprocess.run(
        [*launcher, *ranks, str(world), str(tmp_path / "run")],
        cwd=ROOT,
        env=environment | {"ENDS": how},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1, done.stderr  # the launcher's own
    [line] = [line for line in done.stderr.splitlines() if line.startswith("prefloop: rank 0: ")]
    assert told in line
    kept = newest_checkpoint(tmp_path / "run")
    assert (kept and kept.name) == step


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_are_terminated_and_the_first_leaves_with_what_they_tell_each_other(
    world, tmp_path, monkeypatch
):
    """Without torchrun, whose agent keeps it."""
    monkeypatch.setenv("ENDS", "terminated")
    words = ("-m", "tests.training.end_on_rank", str(world), str(tmp_path / "run"))
    _, (told, code) = on_ranks(2, *words)
    assert code == 143, told
    assert told.splitlines()[-1] == "prefloop: rank 1: terminated"


@pytest.mark.parametrize(
    ("those", "first", "asked"),
    [
        ({6}, 6, ["0123", "45", "6", "6"]),
        ({0, 7}, 0, ["0123", "01", "0", "0"]),
        (set(), None, ["0123", "45", "6", "7"]),  # only their sum has it
    ],
)
def test_the_first_of_eight_ranks_is_found_by_halves(those, first, asked):
    seen = []

    def has(some):
        seen.append("".join(map(str, some)))
        return bool(those & set(some))

    assert (first_of(range(8), has), seen) == (first, asked)
