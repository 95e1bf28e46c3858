"""Plain Hugging Face folders, written whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from prefloop import distributed
from prefloop.errors import AGAIN, UserError, disk_error, first_line
from prefloop.models import adapters, shared
from prefloop.models.model import LoadedModel
from prefloop.models.sharding import Sharded, gathered, on_first
from prefloop.models.weights import stored_types
from prefloop.runs import model_path

FILE_BYTES = 2**31
"""Of weights that are gathered from several ranks: what the first rank holds at once."""
KEPT = (torch.float32, torch.bfloat16, torch.float16)
"""Types that an export keeps; others become float32."""


def export_model(model: LoadedModel, folder: Path, file_bytes: int = FILE_BYTES) -> None:
    """Saves weights and tokenizer for Transformers, vLLM, TRL and lm-eval as they are.

    LoRA gives a PEFT adapter folder, on the whole weights that lie below; where training began from
    an adapter that had to be merged, whole weights with both merged. Whole weights are cast to the
    type that the model's own folder came in, adapters stay float32.
    """
    if model.sharded is not None:
        _export_divided(model, model.sharded, folder, file_bytes)
        return
    with whole_folder(folder) as temporary:
        save_model(model, temporary, model.source_dtype)


def _export_divided(model: LoadedModel, sharded: Sharded, folder: Path, file_bytes: int) -> None:
    """The same by the first rank, to which all ranks' slices go: all of an adapter's, of whole
    weights those of one file at a time. All ranks call it.
    """
    module = model.module
    with whole_folder(folder) if distributed.rank() == 0 else nullcontext() as temporary:
        if not isinstance(module, PeftModel) and _stored_by_name(sharded.bare):
            _write_in_files(model, temporary, file_bytes)
            if temporary is not None:
                bare = replace(model, module=sharded.bare, sharded=None)
                save_model(bare, temporary, model.source_dtype, weights=False)
            return
        own = {n for n, p in module.named_parameters() if p.requires_grad or "lora_" in n}
        merges = isinstance(module, PeftModel) and model.adapters is None and _begun(model)
        every = merges or not isinstance(module, PeftModel)
        with gathered(model, lambda name: every or name in own) as there:
            if temporary is not None:
                save_model(there, temporary, model.source_dtype)


def _begun(model: LoadedModel) -> bool:
    return adapters.is_adapter_folder(model_path(model.source))


def _stored_by_name(module: Any) -> bool:
    """Whether Transformers stores the weights under the names that the model has for them."""
    state = module.state_dict()
    stored = revert_weight_conversion(module, dict(state))
    return stored.keys() == state.keys() and all(stored[n] is state[n] for n in state)


def _write_in_files(model: LoadedModel, folder: Path | None, file_bytes: int) -> None:
    """Whole weights in files of at most so many bytes (or one weight), with an index of several."""
    module, each = model.module, model.source_dtype.itemsize
    buffers = dict(module.named_buffers())
    tensors = {name: p.detach() for name, p in module.named_parameters()}  # tied ones once
    tensors |= {n: t for n, t in module.state_dict().items() if n in buffers}
    files: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        held = sum(x.numel() for x in files[-1].values())
        if files[-1] and each * (held + tensor.numel()) > file_bytes:
            files.append({})
        files[-1][name] = tensor
    names = [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    names = ["model.safetensors"] if len(files) == 1 else names
    for file, part in zip(names, files, strict=True):
        weights = on_first(part)
        if folder is not None:
            for name, w in weights.items():
                kind = model.source_dtype if w.is_floating_point() else w.dtype
                weights[name] = w.to(kind).contiguous()
            save_file(weights, folder / file, {"format": "pt"})
    if folder is not None and len(files) > 1:
        where = {name: file for file, part in zip(names, files, strict=True) for name in part}
        total = sum(each * t.numel() for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def save_model(model: LoadedModel, folder: Path, dtype: torch.dtype, weights: bool = True) -> None:
    """Puts weights, cast to `dtype` unless they are an adapter's, and the rest into a folder; the
    rest alone without `weights`.
    """
    module: Any = model.module
    stacked = model.adapters not in (None, (shared.POLICY,))
    begun = isinstance(module, PeftModel) and _begun(model)
    with _own_dropout(model), adapters.quiet():
        if begun and model.adapters is None:
            module = copy.deepcopy(module).float().merge_and_unload()
        if stacked:
            shared.save_adapters(model, folder)
        elif isinstance(module, PeftModel):
            module.save_pretrained(str(folder), selected_adapters=[shared.POLICY])
        elif not weights:
            module.config.architectures = [type(module).__name__]
            module.config.save_pretrained(str(folder))
            if module.can_generate():
                module.generation_config.save_pretrained(str(folder))
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
