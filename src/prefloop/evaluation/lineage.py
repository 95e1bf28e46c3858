"""What led to a model: the runs before it, followed through their settings, and its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefloop.config.resolve import read_yaml
from prefloop.evaluation.comparison import Point, RunRecord, WholeCost, read_run, run_directory
from prefloop.intervals import Interval

BEFORE = ("model", "ref_model", "reward_model", "value_model")
"""Settings that name a model which a run began with."""
NAMES = {"sft": "SFT", "reward": "reward model", "ppo": "PPO", "dpo": "DPO"}


def whole_cost(way: str, models: Sequence[str | Path]) -> WholeCost | None:
    """CPU seconds of each training run that led to `models`; None where no run is known.

    A run that several of them began with counts once.
    """
    runs: dict[Path, RunRecord] = {}
    for model in models:
        _follow(Path(model), (), runs)
    parts: list[tuple[str, float]] = []
    commands = [run.command for run in runs.values()]
    for directory, run in runs.items():
        name = NAMES.get(run.command, run.command)
        if commands.count(run.command) > 1:
            name += f" {directory.name}"
        parts.append((name, run.cpu_seconds))
    return WholeCost(way, tuple(parts)) if parts else None


def mean_cost(costs: Sequence[WholeCost]) -> WholeCost:
    """The cost of one run of a way trained several times: means, part by part.

    Runs that led there by other stages have their sums alone in common.
    """
    first = costs[0]
    if len({len(cost.parts) for cost in costs}) > 1:
        return WholeCost(first.way, (("a run", sum(c.total for c in costs) / len(costs)),))
    columns = zip(*(cost.parts for cost in costs), strict=True)
    means = [(column[0][0], sum(s for _, s in column) / len(costs)) for column in columns]
    return WholeCost(first.way, tuple(means))


def _follow(model: Path, later: tuple[Path, ...], runs: dict[Path, RunRecord]) -> None:
    """Adds the run that `model` came of, after those that led to it.

    `later` are the runs that began with it, the next first. A relative path is one from where the
    next run was started: this folder, or one above that run.
    """
    above = later[0].parents if later else ()
    places = [Path.cwd() / model, *(parent / model for parent in above)]
    directory = next(filter(None, map(run_directory, places)), None)
    if directory is None or (directory := directory.resolve()) in (*runs, *later):
        return
    record = read_run(directory)
    assert record is not None
    if (directory / "config.yaml").exists():
        settings: Mapping[str, Any] = read_yaml(directory / "config.yaml")
        for name in BEFORE:
            given = settings.get(name) or ()
            for one in [given] if isinstance(given, str) else given:
                _follow(Path(one), (directory, *later), runs)
    runs[directory] = record


def checkpoints(way: str, run: RunRecord, number: int = 1) -> list[Point]:
    """Reward against KL while a run trained: every logged step whose KL from its start is known.

    The KL and the scores are PPO's own; gold is what a monitor measured.
    """

    def logged(name: str) -> dict[int, float]:
        return dict(zip(*run.metrics.get(name, ([], [])), strict=True))

    proxy, gold, low, high = map(logged, ("objective/scores", *MONITOR))
    kl = logged("objective/kl") | logged("monitor/kl")
    points = []
    for step in sorted(kl):
        interval = None
        if step in gold:
            mean = gold[step]
            interval = Interval(mean, low.get(step, mean), high.get(step, mean))
        points.append(Point(way, number, step, kl[step], proxy.get(step), interval))
    return points


MONITOR = ("monitor/score", "monitor/low", "monitor/high")
