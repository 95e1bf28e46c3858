"""The same rows in one micro-batch or many, on one rank or two: the same step, for every loss."""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.training.cases import CASES, run_case
from tests.training.small import (
    assert_close_runs,
    assert_same_run,
    flags,
    lines,
    only_checkpoint,
    python,
    settings,
    train,
)

ROOT = Path(__file__).parents[2]
PER_RANK = ("length_p95", "distinct_2")  # means of the ranks' own, and so documented
MIXED = {"batch_size": 5, "ppo_epochs": 3, "num_minibatches": 2, "kl_target": 0.01, "max_steps": 9}


def on_ranks(count, *words, timeout=280):
    """Starts the ranks as torchrun does; each process sums with one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    ranks = [
        subprocess.Popen(
            python(*words),
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        return [(p.returncode, err) for p in ranks for _, err in [p.communicate(timeout=timeout)]]
    finally:
        for process in ranks:
            process.kill()


def assert_all_done(outcomes, folder):
    told = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert [code for code, _ in outcomes] == [0] * len(outcomes), (told, outcomes)


@pytest.fixture(scope="module")
def two_ranks(world, tmp_path_factory):
    """Every case on two ranks, and a PPO run that saves; all in one start of two processes."""
    folder = tmp_path_factory.mktemp("two")
    saving = {"save_every": 1, "keep_checkpoints": 99}
    mixed = json.dumps({"command": "ppo", "to": "mixed"} | saving | MIXED)
    assert_all_done(
        on_ranks(2, "-m", "tests.training.on_rank", str(world), str(folder), *CASES, mixed), folder
    )
    return folder


@pytest.fixture(scope="module")
def one_rank(world, tmp_path_factory):
    """Every case on one rank in one micro-batch a step."""
    folder = tmp_path_factory.mktemp("one")
    for name in CASES:
        run_case(name, world, folder / name)
    return folder


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [40, 1])
def test_micro_batches_change_nothing(name, tokens, world, one_rank, tmp_path):
    """13 rows in steps of 4: 1 x 4, about 2 x 2, 4 x 1; the last step holds one row."""
    run_case(name, world, tmp_path / "run", micro_batch_tokens=tokens)
    assert_close_runs(one_rank / name, tmp_path / "run")


@pytest.mark.parametrize("name", CASES)
def test_ranks_change_nothing(name, one_rank, two_ranks):
    """The last step of the supervised cases has no row for the second rank."""
    assert_close_runs(one_rank / name, two_ranks / name, skip=PER_RANK)


def test_the_runs_learn_something(one_rank):
    """What is compared above is not all zeros, and evaluated where there are held-out rows."""
    for name in CASES:
        rows = lines(one_rank / name)
        assert all(row["grad_norm"] > 1e-3 for row in rows), name
        assert ("eval/loss" in rows[-1]) == (not name.startswith("ppo"))


def test_ppo_on_two_ranks_goes_on_in_mid_iteration(world, two_ranks, tmp_path):
    """Each rank finds its own rollouts again: step 8 is the second of an iteration of six."""
    whole = two_ranks / "mixed"
    assert len(lines(whole)) == 9
    only_checkpoint(whole, tmp_path / "again", 8)
    again = json.dumps({"command": "ppo", "to": "again"} | MIXED)
    outcomes = on_ranks(2, "-m", "tests.training.on_rank", str(world), str(tmp_path), again)
    assert_all_done(outcomes, tmp_path)
    assert_same_run(whole, tmp_path / "again")


def test_a_checkpoint_of_two_ranks_loads_on_one(world, two_ranks, tmp_path):
    """The first step after it is the same where the minibatch is the whole iteration's."""
    for step, tail in ((6, 1), (8, 0)):
        only_checkpoint(two_ranks / "mixed", tmp_path / f"{step}", step)
        train("ppo", world, tmp_path / f"{step}", **MIXED)
        mine, whole = lines(tmp_path / f"{step}"), lines(two_ranks / "mixed")
        assert len(mine) == 9
        assert mine[:step] == whole[:step]
        if tail:  # a new iteration: the same prompts, seeds and weights, so the same samples
            for key in ("objective/kl", "objective/scores", "length_mean"):
                assert mine[step][key] == pytest.approx(whole[step][key], rel=1e-4)


def test_too_few_prompts_for_the_ranks_is_told_by_all(world, tmp_path):
    words = flags(settings("ppo", world, tmp_path / "run", batch_size=1))
    outcomes = on_ranks(2, "-m", "prefloop", "ppo", *words)
    assert [code for code, _ in outcomes] == [2, 2]
    for _, said in outcomes:
        assert said.count("\n") == 1
        assert "too few" in said
    assert not (tmp_path / "run").exists()
