"""Checkpoints: everything a run needs to go on, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from prefloop.data.tokenize import Example
from prefloop.errors import AGAIN, UserError, disk_error, first_line
from prefloop.models import adapters
from prefloop.models.four_bits import SCALES
from prefloop.models.model import LoadedModel
from prefloop.models.sharding import whole
from prefloop.provenance import files_digest
from prefloop.resume import checkpoint_step, discard, seal
from prefloop.training import slices

FILE = "state.pt"
FORMAT = 2
"""Of what a checkpoint holds: one that says another number is of another version."""
SAMPLE = 64  # elements of a tensor that are looked at one by one


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    keep: int,
    best: int | None = None,
    written: Path | None = None,
) -> Path:
    """Writes checkpoints/step-N through a temporary folder, its manifest last; keeps the newest
    `keep`. What `save_best` wrote of the step `best` goes along.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step}"
    temporary = folder / f".step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write(temporary / FILE, dict(state))
        if written is not None:  # by all ranks
            os.replace(written, temporary / slices.FOLDER)
        if best is not None and best_file(folder, best).exists():
            _link(best_file(folder, best), best_file(temporary, best))
        seal(temporary)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError | UserError):
            raise _unwritten(final, error) from error
        raise
    if final.exists():
        discard(final)
    os.replace(temporary, final)
    fsync_folder(folder)
    complete = sorted(folder.glob("step-*"), key=checkpoint_step)
    for old in complete[:-keep]:
        discard(old)
    return final


def _write(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _unwritten(path: Path, error: Exception) -> UserError:
    problem = first_line(disk_error(error) or error)
    return UserError(f"{path}: cannot be written ({problem}); {AGAIN}")


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def best_file(folder: Path, step: int) -> Path:
    """The weights of the step that the monitor scores best: beside the checkpoints, and in each."""
    return folder / f"best-{step}.pt"


def save_best(folder: Path, step: int, state: Mapping[str, Tensor], before: int | None) -> None:
    """Writes the best step's weights; those of the best `before` stay for the next checkpoint,
    which may be of the step before, and all older ones go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, temporary = best_file(folder, step), folder / ".best.tmp"
    try:
        _write(temporary, dict(state))
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise _unwritten(final, error) from error
    os.replace(temporary, final)
    for old in folder.glob("best-*.pt"):
        if old != final and (before is None or old != best_file(folder, before)):
            old.unlink()


def take_best(path: Path | None, folder: Path) -> None:
    """The best weights are those that a checkpoint knows, or none."""
    for old in folder.glob("best-*.pt"):
        old.unlink()
    for file in path.glob("best-*.pt") if path else ():
        folder.mkdir(parents=True, exist_ok=True)
        _link(file, folder / file.name)


def load_best(folder: Path, step: int) -> dict[str, Tensor]:
    """The best step's weights."""
    return _read(best_file(folder, step))


def fsync_folder(folder: Path) -> None:
    """Makes a rename in the folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> dict[str, Any]:
    """Reads one checkpoint (its folder)."""
    state = _read(path / FILE)
    if not isinstance(state, dict) or "step" not in state:
        raise UserError(f"{path}: not a checkpoint of prefloop; remove it or name another")
    return slices.put_in(state, path / slices.FOLDER)  # type: ignore[no-any-return]


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, UnpicklingError) as error:
        where = path.parent if path.name == FILE else path
        raise UserError(
            f"{where}: not a readable checkpoint ({first_line(error)}); remove it or name another"
        ) from error
    return state


def remove_all(folder: Path) -> None:
    """Removes every checkpoint, and their folder if it holds nothing else."""
    for path in folder.glob("step-*"):
        with contextlib.suppress(OSError):
            discard(path)
    for path in folder.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    take_best(None, folder)
    with contextlib.suppress(OSError):
        folder.rmdir()


def rng_state() -> dict[str, Any]:
    """The state of every global random number generator, as tensors and plain values."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),  # type: ignore[union-attr]
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Puts it back."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])


def fingerprint(
    examples: Iterable[Example], fixed: Iterable[LoadedModel] = (), more: str = ""
) -> str:
    """sha256 of the rows as they were read, of the models' frozen weights, and of `more`.

    Not of the rows' tokens: a chat template may print today's date.
    """
    digest = hashlib.sha256(more.encode())
    for e in examples:
        digest.update(e.source.encode() or repr((e.prompt, e.answers)).encode())
        digest.update(b"\n")
    for model in fixed:
        digest.update(weights_digest(model, frozen(model.module)).encode())
    return digest.hexdigest()


def weights_digest(model: LoadedModel, tensors: Sequence[Tensor]) -> str:
    """sha256 of `tensors`, weights of the model as it was loaded; "" of none.

    Where they came from safetensors files, those are hashed (once in a process), and in memory each
    tensor is only summed, bit for bit, on its device: weights that were moved there are seen, and
    nothing large leaves it.
    """
    if not tensors:
        return ""
    files = _files(model.source)
    digest = hashlib.sha256(files.encode())
    for part in map(_summary, map(whole, tensors)) if files else map(whole, tensors):
        digest.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _files(source: str) -> str:
    """Digests of the files that a model was loaded from, adapters before their base; "" if not all
    of them are there as safetensors.
    """
    *above, path = adapters.chain(source)
    if not Path(path).is_dir():
        try:  # a hub id, whose files lie in the cache
            path = str(Path(str(cached_file(path, "config.json", local_files_only=True))).parent)
        except (OSError, ValueError):  # made in memory
            return ""
    digests = [files_digest(folder) for folder in (*above, path)]
    return " ".join(digests) if all(digests) else ""


def _summary(tensor: Tensor) -> Tensor:
    """[SAMPLE + 2] integers: the sum of a tensor's bits, their number, and some of them.

    The sum sees any element that changes, the others those that change places.
    """
    kind = {1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32)
    bits = tensor.detach().contiguous().view(-1).view(kind)
    places = torch.arange(SAMPLE, device=bits.device) * bits.numel() // SAMPLE
    sample = bits[places].long() if bits.numel() else places
    total = bits.sum(dtype=torch.int64, dim=0, keepdim=True)
    return torch.cat([total, torch.full_like(total, bits.numel()), sample])


def weights_of(module: nn.Module) -> list[Tensor]:
    """All that are parameters on one rank, too, where scales of 4 bits are none."""
    return [p for name, p in module.named_parameters() if not name.endswith(SCALES)]


def frozen(module: nn.Module) -> list[Tensor]:
    """The weights that training leaves as they are."""
    return [p for p in weights_of(module) if not p.requires_grad]


def trainable_state(trained: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Tensors that training changes, by name (see LoadedModel.named_trainable)."""
    return {name: p.detach() for name, p in trained.items()}


def load_trainable_state(
    trained: Mapping[str, nn.Parameter], state: Mapping[str, torch.Tensor]
) -> None:
    """Puts a checkpoint's tensors back; the names must be exactly the model's."""
    shapes = {name: p.shape for name, p in trained.items()}
    if shapes != {name: tensor.shape for name, tensor in state.items()}:
        raise ValueError("made with another model or other LoRA settings")
    slices.read((parameter, state[name]) for name, parameter in trained.items())


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Puts moments and step counts back; rates, decays and the like stay as the settings say."""
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
