"""The same rows in one micro-batch or many, on one rank or two: the same step, for every loss."""

import json

import pytest

from tests.ranks import on_ranks
from tests.training.cases import CASES, run_case
from tests.training.small import (
    REWARDS,
    assert_close_runs,
    assert_same_run,
    lines,
    only_checkpoint,
    train,
)

pytestmark = pytest.mark.timeout(1200)
MIXED = {"batch_size": 3, "ppo_epochs": 2, "num_minibatches": 2, "kl_target": 0.01, "max_steps": 5}
MIXED |= {"eval_fraction": 0.3, "eval_every": 2}

DROPS = {"batch_size": 4, "epochs": 2.0, "lora_rank": 2, "lora_dropout": 0.4, "lr": 0.05}


@pytest.fixture(scope="module")
def two_ranks(world, tmp_path_factory):
    """Every case and what else needs two ranks, all in one start of two processes."""
    folder = tmp_path_factory.mktemp("two")
    saving = {"save_every": 1, "keep_checkpoints": 99}
    shared = {"lora_rank": 2, "reward_model": str(world / "rm_one")}
    train("ppo", world, folder / "solo", **saving, **MIXED)
    monitored = MIXED | {"monitor": f"{REWARDS}:by_length", "monitor_steps": 2, "keep_best": True}
    monitored |= {"monitor_data": str(world / "prompts.jsonl")}
    train("ppo", world, folder / "watched-alone", **monitored)
    jobs = [
        {"command": "ppo", "to": "watched"} | saving | monitored,
        {"copy": ["watched", "watched-again", 3]},
        {"command": "ppo", "to": "watched-again"} | monitored,
        {"copy": ["solo", "solo-again", 3]},
        {"command": "ppo", "to": "solo-again"} | MIXED,
        {"command": "ppo", "to": "mixed"} | saving | MIXED,
        {"copy": ["mixed", "again", 3]},
        {"command": "ppo", "to": "again"} | MIXED,
        {"command": "ppo", "to": "few", "batch_size": 1},
        {"command": "ppo", "to": "shared"} | saving | MIXED | shared,
        {"copy": ["shared", "shared-again", 3]},
        {"command": "ppo", "to": "shared-again"} | MIXED | shared,
        {"command": "dpo", "to": "drops"} | saving | DROPS,
        {"copy": ["drops", "drops-again", 2]},
        {"command": "dpo", "to": "drops-again"} | DROPS,
    ]
    outcomes = on_ranks(
        2, "-m", "tests.training.on_rank", str(world), str(folder), *CASES, *map(json.dumps, jobs)
    )
    told = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert [code for _, code in outcomes] == [0, 0], (told, outcomes)
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
    """9 rows in steps of 4: 1 x 4, about 2 x 2, 4 x 1; the last step holds one row."""
    run_case(name, world, tmp_path / "run", micro_batch_tokens=tokens)
    assert_close_runs(one_rank / name, tmp_path / "run")


@pytest.mark.parametrize("name", CASES)
def test_ranks_change_nothing(name, one_rank, two_ranks):
    """The last step of the supervised cases has no row for the second rank."""
    assert_close_runs(one_rank / name, two_ranks / name)


def test_the_runs_learn_something(one_rank):
    """What is compared above is not all zeros, and evaluated where there are held-out rows."""
    for name in CASES:
        rows = lines(one_rank / name)
        norms = [max(v for k, v in row.items() if k.startswith("grad_norm")) for row in rows]
        assert all(norm > 1e-3 for norm in norms), name  # a critic may learn alone
        assert ("eval/loss" in rows[-1]) == (not name.startswith("ppo"))


def test_ppo_on_two_ranks_goes_on_in_mid_iteration(two_ranks):
    """Each rank finds its own rollouts again: step 3 is in an iteration of four."""
    assert len(lines(two_ranks / "mixed")) == 5
    assert_same_run(two_ranks / "mixed", two_ranks / "again")


def test_one_base_on_two_ranks_goes_on_in_mid_iteration(two_ranks):
    assert_same_run(two_ranks / "shared", two_ranks / "shared-again")


def test_a_monitor_on_two_ranks_measures_as_on_one(two_ranks):
    """And a run goes on to the same bits, with the same step kept."""
    assert_close_runs(two_ranks / "watched-alone", two_ranks / "watched")
    assert_same_run(two_ranks / "watched", two_ranks / "watched-again")
    runs = ("watched-alone", "watched", "watched-again")
    kept = [json.loads((two_ranks / run / "run.json").read_text())["model_step"] for run in runs]
    assert kept[0] == kept[1] == kept[2]


def test_dropout_on_two_ranks_goes_on_to_the_same_bits(world, two_ranks, tmp_path):
    """On one rank it goes on, too, but drops otherwise: draws are a rank's own, as the docs say."""
    assert_same_run(two_ranks / "drops", two_ranks / "drops-again")
    only_checkpoint(two_ranks / "drops", tmp_path / "one", 2)
    train("dpo", world, tmp_path / "one", **DROPS)
    mine, whole = lines(tmp_path / "one"), lines(two_ranks / "drops")
    assert mine[:2] == whole[:2]
    assert len(mine) == len(whole) == 5
    assert mine[2]["loss"] != pytest.approx(whole[2]["loss"], rel=1e-4)


def test_a_checkpoint_of_one_rank_loads_on_two(two_ranks):
    """Step 4 learns from the rollouts that were saved; step 5 samples with the same weights."""
    whole, mine = lines(two_ranks / "solo"), lines(two_ranks / "solo-again")
    assert len(mine) == len(whole) == 5
    assert mine[:3] == whole[:3]
    assert mine[3]["loss"] == pytest.approx(whole[3]["loss"], rel=1e-4)
    for key in ("objective/kl", "objective/scores", "length_mean", "kl_coef"):
        assert mine[4][key] == pytest.approx(whole[4][key], rel=1e-4)


@pytest.mark.slow
def test_a_rank_that_fails_costs_no_whole_step(world, tmp_path):
    """Where models are whole: the first rank hears of it, and saves alone."""
    changes = {"batch_size": 3, "ppo_epochs": 2}
    failing = f"{REWARDS}:fails_on_the_second_rank"
    job = {"command": "ppo", "to": "run", "reward_function": failing, "shard": "none"} | changes
    outcomes = on_ranks(
        2, "-m", "tests.training.on_rank", str(world), str(tmp_path), json.dumps(job)
    )
    assert "no answer" in (tmp_path / "run-told-1").read_text()
    assert outcomes[0][1] != 0  # it lost its peer
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert kept == ["step-4"], outcomes
    before = lines(tmp_path / "run")
    assert [line["step"] for line in before] == [1, 2, 3, 4]


@pytest.mark.parametrize("step", [3, 4])
def test_a_checkpoint_of_two_ranks_loads_on_one(step, world, two_ranks, tmp_path):
    """From step 4 an iteration begins: the same weights, prompts and seeds, so the same samples."""
    only_checkpoint(two_ranks / "mixed", tmp_path / "one", step)
    train("ppo", world, tmp_path / "one", **MIXED)
    mine, whole = lines(tmp_path / "one"), lines(two_ranks / "mixed")
    assert len(mine) == len(whole) == 5
    assert mine[:step] == whole[:step]
    if step == 4:
        for key in ("objective/kl", "objective/scores", "length_mean", "kl_coef"):
            assert mine[4][key] == pytest.approx(whole[4][key], rel=1e-4)


def test_too_few_prompts_for_the_ranks_is_told_by_all(two_ranks):
    assert len(list(two_ranks.glob("few-told-?"))) == 2
    for path in two_ranks.glob("few-told-?"):
        assert "1 prompts an iteration are too few for --num-minibatches 1" in path.read_text()
    assert not (two_ranks / "few").exists()
