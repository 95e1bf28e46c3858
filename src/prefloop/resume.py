"""What a run may go on from, and with which settings. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prefloop.config import TrainingConfig
from prefloop.config.resolve import as_dict, default_settings, flag, read_yaml
from prefloop.errors import UserError
from prefloop.files import set_aside, write_atomic
from prefloop.terminal import shown

MANIFEST = "manifest.json"
"""Of a checkpoint, written after all of its other files: the size and the sha256 of each."""
FREE_TO_CHANGE = frozenset(
    "output resume track save_every save_minutes keep_checkpoints log_every eval_every device "
    "micro_batch_tokens gradient_checkpointing max_concurrent shard mesh rollout_engine "
    "rollout_timeout rollout_patience rollout_folder".split()
)
"""Settings that may differ when a run goes on: they change rounding at most, or who draws."""
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


def seal(folder: Path) -> None:
    """Puts a checkpoint's files on disk, and then its manifest beside them."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    with ThreadPoolExecutor() as threads:
        stored = threads.map(_part, paths)
        parts = {str(p.relative_to(folder)): part for p, part in zip(paths, stored, strict=True)}
    write_atomic(folder / MANIFEST, json.dumps({"files": parts}, indent=2) + "\n")


def _part(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def flaw(folder: Path) -> str:
    """What of a checkpoint is not as its manifest says; "" of a sound one."""
    try:
        parts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"].items()
        with ThreadPoolExecutor() as threads:
            return next(filter(None, threads.map(lambda part: _flaw(folder, *part), parts)), "")
    except FileNotFoundError:
        return f"no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"


def _flaw(folder: Path, name: str, stored: dict[str, object]) -> str:
    path = folder / name
    if not path.is_file():
        return f"no {name}"
    if (size := path.stat().st_size) != stored["bytes"]:
        return f"{name} has {size:,} bytes, not {stored['bytes']:,}"
    return "" if _part(path) == stored else f"{name} has another sha256 than when it was written"


def newest_sound(directory: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that is as its manifest says, and what is wrong with newer ones.

    UserError where none is sound and one has no manifest: an earlier prefloop wrote none.
    """
    damaged: dict[Path, str] = {}
    for path in checkpoints(directory):
        wrong = flaw(path)
        if not wrong:
            return path, damaged
        damaged[path] = wrong
    for path in damaged:
        if not (path / MANIFEST).exists():
            raise UserError(
                f"{path}: no {MANIFEST}, so it is torn, or made by an earlier prefloop; go on with "
                "that one, or remove it to begin anew"
            )
    return None, damaged


def discard(path: Path) -> None:
    """Removes a checkpoint; what a kill leaves of it is hidden, and `Run.go_on` removes that."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def pass_over(damaged: Mapping[Path, str], checkpoint: Path | None) -> None:
    """Tells what is wrong with each, and renames it: what the run writes must not replace it."""
    for path, wrong in damaged.items():
        aside = set_aside(path, f"damaged-{path.name}")
        on = checkpoint.name if checkpoint else "the start"
        print(
            shown(f"{path}: {wrong}; kept as {aside.name}, the run goes on from {on}"),
            file=sys.stderr,
        )


def checkpoints(directory: Path) -> list[Path]:
    """Those of a run directory, newest first."""
    folders = (directory / "checkpoints").glob("step-*")
    named = [path for path in folders if re.fullmatch(r"step-\d+", path.name)]
    return sorted(named, key=checkpoint_step, reverse=True)


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
