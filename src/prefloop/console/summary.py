"""The end of a training run: what was learned, what it cost, where it lies, what to type next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefloop.config.resolve import flag, read_yaml
from prefloop.progress import in_words
from prefloop.runs import Run
from prefloop.sources import addresses_and_weights
from prefloop.terminal import shown

TOLD = {
    "loss": "loss",
    "accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "objective/scores": "score",
    "objective/kl": "KL",
    "length_mean": "tokens an answer",
}
"""Metrics that say what was learned, in words."""


def lines_of(run: Run) -> list[str]:
    """What is told of a finished run."""
    settings, record = read_yaml(run.directory / "config.yaml"), run.record
    cost = (
        f"{record['command']}: {record['steps']:,} steps, {record['tokens']:,} tokens in "
        f"{in_words(record['wall_seconds'])} ({in_words(record['cpu_seconds'])} of CPU), "
        f"{record['peak_memory_gib']:.1f} GiB at most"
    )
    lies = f"model: {run.model}"
    said = [cost, *_learned(run), lies, f"next: {following(run, settings)}"]
    return [shown(line) for line in said]


def _learned(run: Run) -> list[str]:
    """Held-out rows before and after; without any, the training rows of the first and last step."""
    logged = [json.loads(line) for line in _logged(run.directory / "metrics.jsonl")]
    before = run.record.get("held_out_before")
    after = {k[5:]: v for k, v in logged[-1].items() if k.startswith("eval/")} if logged else {}
    if before and after:
        return [f"held out: {_change(before, after)}"]
    if len(logged) < 2:
        return []
    first: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for line in logged:  # PPO measures some once an iteration
        first, last = line | first, last | line
    return [f"training rows, first and last: {_change(first, last)}"]


def _logged(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _change(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{word} {before[name]:.3f} -> {after[name]:.3f}"
        for name, word in TOLD.items()
        if before.get(name) is not None and after.get(name) is not None
    )


def following(run: Run, settings: Mapping[str, Any]) -> str:
    """The command that comes next, with this run's paths; it can be typed as it stands."""
    here = str(run.directory)
    data = addresses_and_weights(settings["data"])[0][0]
    same = {name: settings.get(name, False) for name in ("chat", "template_args", "device")}
    if run.record["command"] == "reward":
        given = {"model": settings["model"], "reward_model": here, "data": data}
        return _typed("ppo", given | {"output": _free(run.directory.with_name("ppo"))} | same)
    if run.record.get("text") == "messages":
        same["chat"] = False  # no setting of the command
        return _typed("chat", {"model": here} | same)
    return _typed("generate", {"model": here, "data": data, "max_prompts": 3} | same)


def _typed(command: str, settings: Mapping[str, Any]) -> str:
    """The command line, but for settings that are as they are by default."""
    words: list[str] = []
    for name, value in settings.items():
        if value in (False, "{}", "auto"):
            continue
        words += [flag(name)] if value is True else [flag(name), shlex.quote(str(value))]
    return " ".join(["prefloop", command, *words])


def _free(path: Path) -> Path:
    """The path, or the first of `path-2`, `path-3`, ... that is not there."""
    names: Iterable[Path] = (path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000)))
    return next(name for name in names if not name.exists())
