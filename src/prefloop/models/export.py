"""Plain Hugging Face folders, written whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from prefloop.errors import AGAIN, UserError, disk_error, first_line
from prefloop.models import adapters, shared
from prefloop.models.model import LoadedModel
from prefloop.models.weights import stored_types
from prefloop.runs import model_path

KEPT = (torch.float32, torch.bfloat16, torch.float16)
"""Types that an export keeps; others become float32."""


def export_model(model: LoadedModel, folder: Path) -> None:
    """Saves weights and tokenizer for Transformers, vLLM, TRL and lm-eval as they are.

    LoRA gives a PEFT adapter folder, on the whole weights that lie below; where training began from
    an adapter that had to be merged, whole weights with both merged. Whole weights are cast to the
    type that the model's own folder came in, adapters stay float32.
    """
    with whole_folder(folder) as temporary:
        save_model(model, temporary, model.source_dtype)


def save_model(model: LoadedModel, folder: Path, dtype: torch.dtype) -> None:
    """Puts weights, cast to `dtype` unless they are an adapter's, and the rest into a folder."""
    module: Any = model.module
    stacked = model.adapters not in (None, (shared.POLICY,))
    begun = isinstance(module, PeftModel) and adapters.is_adapter_folder(model_path(model.source))
    with _own_dropout(model), adapters.quiet():
        if begun and model.adapters is None:
            module = copy.deepcopy(module).float().merge_and_unload()
        if stacked:
            shared.save_adapters(model, folder)
        elif isinstance(module, PeftModel):
            module.save_pretrained(str(folder), selected_adapters=[shared.POLICY])
        else:
            module.save_pretrained(str(folder), state_dict=_cast(module, dtype))
        if model.is_scorer:  # with an adapter too: its pad token, its mean score
            model.config.save_pretrained(str(folder))
    if not isinstance(module, PeftModel):
        _say_dtype(folder / "config.json", dtype)
    model.tokenizer.save_pretrained(str(folder))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `folder` at the end, and is gone on errors."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if (failed := disk_error(error)) is not None:
            problem = first_line(failed)
            raise UserError(f"{folder}: cannot be written ({problem}); {AGAIN}") from error
        raise
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def source_dtype(path: str) -> torch.dtype:
    """The type of most bytes in a model folder, an adapter's base; a hub id's as its config says.

    float32 where they are stored in a type that weights are not kept in here.
    """
    path = adapters.root_base(path)
    sizes = stored_types(path)
    kind = sizes.most_common(1)[0][0] if sizes else AutoConfig.from_pretrained(path).dtype
    return kind if kind in KEPT else torch.float32


def _cast(module: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The module's weights in `dtype`; what shares its memory goes on doing so."""
    done: dict[tuple[int, torch.Size], Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        key = tensor.data_ptr(), tensor.shape
        if key not in done:
            done[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        state[name] = done[key]
    return state


def _say_dtype(file: Path, dtype: torch.dtype) -> None:
    """Lets config.json say what the weights beside it are; Transformers wrote what they were."""
    said = json.loads(file.read_text(encoding="utf-8"))
    for part in (said, *(value for value in said.values() if isinstance(value, dict))):
        if part is said or "dtype" in part:
            part["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _own_dropout(model: LoadedModel) -> Iterator[None]:
    """Within it, the configuration says the dropout that the model came with."""
    for holder, name, rate in model.dropout:
        setattr(holder, name, rate)
    try:
        yield
    finally:
        for holder, name, _ in model.dropout:
            setattr(holder, name, 0.0)
