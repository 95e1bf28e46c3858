"""What a run may go on from, and with which settings. Imports no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prefloop.config import TrainingConfig
from prefloop.config.resolve import as_dict, default_settings, flag, read_yaml
from prefloop.errors import UserError

FREE_TO_CHANGE = frozenset(
    "output resume track save_every save_minutes keep_checkpoints log_every eval_every device "
    "micro_batch_tokens gradient_checkpointing max_concurrent".split()
)
"""Settings that may differ when a run goes on: they change rounding at most."""
APPLIED = frozenset(
    "epochs max_steps lr value_lr lr_schedule lr_floor warmup weight_decay adam_beta1 adam_beta2 "
    "adam_eps max_grad_norm eval_data stop_on_hacking".split()
)
"""Settings that may also differ with a checkpoint named outright: from there on they hold."""


def checkpoint_step(checkpoint: Path) -> int:
    """Number of optimiser steps before a checkpoint, from its name `step-N`."""
    match = re.fullmatch(r"step-(\d+)", checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint}: not a checkpoint; its folder is named step-N")
    return int(match[1])


def read_record(directory: Path) -> dict[str, Any] | None:
    """run.json of a run directory, or None where there is none."""
    path = directory / "run.json"
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "status" in record and "command" in record:
            return record
    except (ValueError, OSError, TypeError) as error:
        raise UserError(f"{path}: not a run's record; give another --output") from error
    raise UserError(f"{path}: not a run's record; give another --output")


def named_checkpoint(config: TrainingConfig, command: str) -> Path:
    """The checkpoint that --resume names; UserError unless it is one of a run like this."""
    checkpoint = Path(config.resume)
    if not checkpoint.is_dir():
        raise UserError(f"--resume {checkpoint}: no such checkpoint folder")
    checkpoint_step(checkpoint)
    directory = checkpoint.resolve().parent.parent
    previous = read_record(directory)
    if previous is None:
        raise UserError(
            f"--resume {checkpoint}: stands in no run directory, so its settings are not known; "
            "give its path there"
        )
    require_same(directory, config, command, previous)
    return checkpoint


def require_same(
    directory: Path, config: TrainingConfig, command: str, previous: dict[str, Any]
) -> None:
    """UserError naming what differs between this run and the one that stands in `directory`.

    A setting that did not exist when that run began had its default.
    """
    if previous["command"] != command:
        raise UserError(
            f"{directory} holds a run of `{previous['command']}`, not of `{command}`; "
            "give another --output"
        )
    settings = as_dict(config)
    stored = default_settings(config) | read_yaml(directory / "config.yaml")
    free = FREE_TO_CHANGE if config.resume in ("auto", "never") else FREE_TO_CHANGE | APPLIED
    keys = (settings.keys() | stored.keys()) - free
    differing = sorted(key for key in keys if stored.get(key) != settings.get(key))
    if differing:
        changes = [f"{flag(k)} was {stored.get(k)}, now {settings.get(k)}" for k in differing]
        mend = "give the same ones or another --output"
        if APPLIED.issuperset(differing):
            mend = "give the same ones, another --output, or --resume CHECKPOINT to apply them"
        raise UserError(
            f"{directory} holds a run with other settings ({', '.join(changes)}); {mend}"
        )
