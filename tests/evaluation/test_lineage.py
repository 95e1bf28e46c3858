import json
from pathlib import Path

import pytest
import yaml

from prefloop.evaluation.comparison import Point, RunRecord, WholeCost
from prefloop.evaluation.lineage import checkpoints, mean_cost, whole_cost
from prefloop.intervals import Interval


def run(directory: Path, command: str, seconds: float, **settings: object) -> Path:
    (directory / "model").mkdir(parents=True)
    record = {"command": command, "status": "finished", "wall_seconds": 1.0, "tokens": 1}
    record |= {"cpu_seconds": seconds, "peak_memory_gib": 1.0}
    (directory / "run.json").write_text(json.dumps(record))
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """As a pipeline leaves them, with paths from the folder where it was started."""
    base = tmp_path / "runs"
    run(base / "sft", "sft", 119.0, model="some/base-model")
    run(base / "reward", "reward", 144.0, model="runs/sft/model")
    both = {"model": "runs/sft", "reward_model": ["runs/reward", "owner/other"], "ref_model": None}
    run(base / "ppo", "ppo", 392.0, **both)
    run(base / "dpo", "dpo", 541.0, model=str(base / "sft/model"))
    run(base / "again", "dpo", 100.0, model="runs/dpo/model", ref_model="runs/sft/model")
    return base


def test_each_run_that_led_to_a_model_counts_once(runs: Path) -> None:
    ppo = (("SFT", 119.0), ("reward model", 144.0), ("PPO", 392.0))
    assert whole_cost("PPO", (runs / "ppo",)) == WholeCost("PPO", ppo)
    assert whole_cost("PPO", (runs / "ppo" / "model",)) == WholeCost("PPO", ppo)
    assert WholeCost("PPO", ppo).total == 655.0
    assert whole_cost("DPO", (runs / "dpo",)) == WholeCost("DPO", (("SFT", 119.0), ("DPO", 541.0)))
    best = whole_cost("best-of-4", (runs / "sft", runs / "reward"))
    assert best == WholeCost("best-of-4", ppo[:2])


def test_runs_of_one_command_are_named_by_folder(runs: Path) -> None:
    found = whole_cost("DPO", (runs / "again" / "model",))
    assert found == WholeCost("DPO", (("SFT", 119.0), ("DPO dpo", 541.0), ("DPO again", 100.0)))


def test_what_is_no_run_costs_nothing_known(runs: Path, tmp_path: Path) -> None:
    assert whole_cost("x", ("owner/model",)) is None
    assert whole_cost("x", (tmp_path,)) is None
    run(tmp_path / "odd", "sft", 1.0, model=str(tmp_path / "odd" / "model"))
    assert whole_cost("x", (tmp_path / "odd",)) == WholeCost("x", (("SFT", 1.0),))


def test_mean_cost() -> None:
    first = WholeCost("PPO", (("SFT", 100.0), ("PPO", 300.0)))
    second = WholeCost("PPO", (("SFT", 100.0), ("PPO", 500.0)))
    assert mean_cost([first, second]) == WholeCost("PPO", (("SFT", 100.0), ("PPO", 400.0)))
    third = WholeCost("PPO", (("PPO", 200.0),))
    assert mean_cost([first, second, third]) == WholeCost("PPO", (("a run", 400.0),))


def test_checkpoints_join_what_ppo_and_its_monitor_logged() -> None:
    metrics = {
        "objective/kl": ([1, 3, 5], [0.0, 1.5, 4.0]),
        "objective/scores": ([1, 3, 5], [0.1, 0.9, 2.0]),
        "monitor/score": ([3, 4], [0.5, 0.4]),
        "monitor/low": ([3], [0.3]),
        "monitor/high": ([3], [0.7]),
        "monitor/kl": ([3, 4], [1.25, 2.5]),
    }
    record = RunRecord("ppo", 1.0, 1.0, 1.0, None, metrics)
    assert checkpoints("PPO", record, 2) == [
        Point("PPO", 2, 1, 0.0, 0.1, None),
        Point("PPO", 2, 3, 1.25, 0.9, Interval(0.5, 0.3, 0.7)),
        Point("PPO", 2, 4, 2.5, None, Interval(0.4, 0.4, 0.4)),
        Point("PPO", 2, 5, 4.0, 2.0, None),
    ]
    assert checkpoints("SFT", RunRecord("sft", 1.0, 1.0, 1.0, None, {"loss": ([1], [2.0])})) == []
