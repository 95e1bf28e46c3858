"""Checkpoints: everything a run needs to go on, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefloop.config import UserError
from prefloop.runs import checkpoint_step

FILE = "state.pt"


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int) -> Path:
    """Writes checkpoints/step-N through a temporary folder; keeps the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step}"
    temporary = folder / f".step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    with open(temporary / FILE, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    fsync_folder(folder)
    complete = sorted(folder.glob("step-*"), key=checkpoint_step)
    for old in complete[:-keep]:
        shutil.rmtree(old)
    return final


def fsync_folder(folder: Path) -> None:
    """Makes a rename in the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> dict[str, Any]:
    """Reads one checkpoint (its folder)."""
    try:
        return torch.load(path / FILE, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error}); name another") from error


def trainable_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that training changes, by name."""
    return {name: p.detach() for name, p in _trainable(module)}


def load_trainable_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Puts a checkpoint's tensors back; the names must be exactly the module's."""
    mine = dict(_trainable(module))
    if set(mine) != set(state):
        raise UserError("the checkpoint was made with another model or other LoRA settings")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(state[name])


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)
