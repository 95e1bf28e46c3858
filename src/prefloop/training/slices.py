"""Divided weights and moments in a checkpoint: each rank writes its slices (torch's distributed
checkpoint), and any number of ranks reads them back.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from prefloop import distributed
from prefloop.errors import AGAIN, UserError, first_line
from prefloop.models.sharding import put

FOLDER = "slices"
"""Of a checkpoint, beside what is whole."""


@dataclass(frozen=True)
class Stored:
    """A tensor of which only its place in a checkpoint has been read."""

    folder: Path
    key: str
    shape: torch.Size
    dtype: torch.dtype


def take_out(state: Any, slices: dict[str, Tensor], key: str = "") -> Any:
    """The state with tensors on no device in the place of divided ones, which go into `slices`."""
    if isinstance(state, DTensor):
        slices[key] = state.detach()
        return torch.empty(state.shape, dtype=state.dtype, device="meta")
    if isinstance(state, Mapping):
        return {name: take_out(part, slices, f"{key}/{name}") for name, part in state.items()}
    return state


def put_in(state: Any, folder: Path, key: str = "") -> Any:
    """What `take_out` gave, as it was read, with the places of tensors that stand in `folder`."""
    if isinstance(state, Tensor) and state.is_meta:
        return Stored(folder, key, state.shape, state.dtype)
    if isinstance(state, Mapping):
        return {name: put_in(part, folder, f"{key}/{name}") for name, part in state.items()}
    return state


def write(folder: Path, slices: dict[str, Tensor]) -> None:
    """Every rank writes its own; all ranks call it."""
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    distributed.barrier()
    try:
        state_dict_saver.save(slices, checkpoint_id=folder)
    except (OSError, RuntimeError, CheckpointException) as error:
        if distributed.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({_reason(error)}); {AGAIN}") from error


def read(pairs: Iterable[tuple[Tensor, Tensor | Stored]]) -> None:
    """Writes values of a checkpoint into tensors, divided or whole: of each its own slice."""
    wanted: dict[Path, dict[str, Tensor]] = {}
    for target, value in pairs:
        if isinstance(value, Stored):
            wanted.setdefault(value.folder, {})[value.key] = target.detach()
        else:
            put(target, value)
    for folder, tensors in wanted.items():
        try:
            with warnings.catch_warnings():  # that it is for one process: each reads its own
                warnings.simplefilter("ignore")
                state_dict_loader.load(tensors, checkpoint_id=folder, no_dist=True)
        except (OSError, CheckpointException) as error:
            raise UserError(
                f"{folder}: not readable ({_reason(error)}); name another checkpoint"
            ) from error


def _reason(error: BaseException) -> str:
    """The first rank's failure."""
    failures = getattr(error, "failures", {})
    return first_line(next((each[0] for each in failures.values()), error))
