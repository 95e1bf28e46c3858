"""How a model's weights are kept: in float32, in bfloat16, or in 4 bits (NF4, arXiv 2305.14314).

What is only multiplied may be kept in the type of the products and gives the same bits as a float32
copy would: autocast rounds a weight before each product anyway. What is not multiplied (norms,
scores' heads, embeddings that come in float32) stays as it came, and so does the residual stream.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from prefloop.config import InferenceConfig, TrainingConfig
from prefloop.config.ranges import DType, Weights
from prefloop.errors import UserError, first_line
from prefloop.models.four_bits import quantise
from prefloop.models.memory import file_mappings, release_pages
from prefloop.models.precision import product_type
from prefloop.models.unread import Unread, stand_in

TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Floating types, as safetensors' headers call them."""
Mappings = list[tuple[int, int]]


@dataclass(frozen=True)
class Storage:
    """How products are computed (--dtype) and weights are kept (--weights)."""

    dtype: DType = "float32"
    weights: Weights = "auto"


def storage_of(config: TrainingConfig | InferenceConfig) -> Storage:
    """What a command's settings say of it."""
    return Storage(config.dtype, config.weights)


@dataclass(frozen=True)
class Kept:
    """A storage on a device."""

    products: torch.dtype
    matrices: torch.dtype  # what linear layers are kept in, where not in 4 bits
    nf4: bool
    embeddings: bool  # bfloat16 for embeddings, too, whatever they came in


def kept(storage: Storage, device: torch.device, trained: bool) -> Kept:
    """What `storage` comes to; `trained`: the weights themselves, and not adapters, take gradients.

    `auto` keeps trained weights in float32 and frozen ones in the type of the products.
    """
    products, weights = product_type(storage.dtype, device), storage.weights
    if weights == "bfloat16" and products != torch.bfloat16:
        raise UserError(
            "--weights bfloat16 is for products in bfloat16, which are float32 here; give --dtype "
            "bfloat16, or leave --weights out"
        )
    if weights == "nf4" and trained:
        raise UserError("--weights nf4 cannot be trained itself; give --lora-rank")
    narrow = weights == "bfloat16" or (weights != "float32" and not trained)
    matrices = products if narrow else torch.float32
    return Kept(products, matrices, weights == "nf4", weights == "bfloat16")


def broken_file(folder: str) -> str:
    """Which safetensors file of a folder cannot be read, and why; "" where all can."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file.name}: {first_line(error)}"
    return ""


def stored_types(folder: str) -> Counter[torch.dtype]:
    """Floating types of a folder's weights with their bytes; empty where no safetensors say it."""
    sizes: Counter[torch.dtype] = Counter()
    for file in Path(folder).glob("*.safetensors"):
        with open(file, "rb") as handle:
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > file.stat().st_size:
                return Counter()  # broken: Transformers says so
            try:
                header = json.loads(handle.read(length))
            except ValueError:
                return Counter()
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in TYPES:
                first, last = entry["data_offsets"]
                sizes[TYPES[entry["dtype"]]] += last - first
    return sizes


def loading_type(path: str, plan: Kept) -> torch.dtype | str:
    """The type to read a model's weights in: the one that loses nothing of what is to be kept.

    `auto`, as Transformers finds it, where the folder does not say.
    """
    sizes = stored_types(path)
    if not sizes:
        return "auto"
    if plan.nf4 or plan.matrices != torch.float32:
        return sizes.most_common(1)[0][0]
    return max(sizes, key=lambda kind: kind.itemsize)


def settle(
    module: nn.Module,
    device: torch.device,
    plan: Kept,
    later: Collection[nn.Parameter] = frozenset(),
) -> Unread:
    """Moves a model to the device, each weight in the form that `plan` keeps it in.

    One weight at a time: the model is never there twice. Those to be read `later` are returned,
    with what stands for them.
    """
    mappings, unread = file_mappings(), Unread()
    if plan.nf4:
        unread |= quantise(module, device, plan.products, later)
    narrow = _narrow(module, plan)
    moved: dict[int, nn.Parameter] = {}  # tied weights stay one
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is None or not weight.is_floating_point():
                continue
            if id(weight) not in moved:
                wide = torch.promote_types(weight.dtype, torch.float32)
                kind = plan.matrices if id(weight) in narrow else wide
                if weight in later:
                    shape, learns = weight.shape, weight.requires_grad
                    moved[id(weight)] = stand_in(shape, device, kind, learns)
                    unread[moved[id(weight)]] = weight.detach()
                else:
                    moved[id(weight)] = _moved(weight, device, kind, mappings)
            part._parameters[name] = moved[id(weight)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
        if isinstance(part, nn.Embedding) and part.weight.dtype == torch.bfloat16:
            part.register_forward_hook(_in_float32)
    return unread


def frozen_copy(module: nn.Module, plan: Kept, unread: Unread) -> tuple[nn.Module, Unread]:
    """The module as it is now, to be left so: each weight in the form that `plan` keeps it in.

    And what of it is unread, as that is in the module.
    """
    narrow, copies, left = _narrow(module, plan), dict[int, Any](), Unread()
    for weight in module.parameters():
        kind = plan.matrices if id(weight) in narrow else weight.dtype
        if weight in unread:
            copied = stand_in(weight.shape, weight.device, kind, False)
            left[copied] = unread[weight]
        else:
            copied = nn.Parameter(weight.detach().to(kind, copy=True), False)
        copies[id(weight)] = copied
    return copy.deepcopy(module, copies), left


def _narrow(module: nn.Module, plan: Kept) -> set[int]:
    """By id(): the weights that are kept in `plan.matrices`."""
    if plan.matrices == torch.float32:
        return set()
    chosen: set[int] = set()
    looked_up: set[int] = set()  # embeddings that keep their digits, and with them a tied head
    for part in module.modules():
        weights = [w for w in part.parameters(recurse=False) if w.ndim > 1]
        if isinstance(part, nn.Embedding):
            short = [w for w in weights if plan.embeddings or w.dtype == plan.matrices]
            chosen |= set(map(id, short))
            looked_up |= set(map(id, weights)) - set(map(id, short))
        elif isinstance(part, nn.Linear | Conv1D) or "expert" in type(part).__name__.lower():
            chosen |= set(map(id, weights))  # a mixture's experts stand stacked in one tensor
    head = getattr(module, "score", None)
    scalar = set(map(id, head.parameters())) if isinstance(head, nn.Module) else set()
    return chosen - looked_up - scalar


def _moved(
    weight: nn.Parameter, device: torch.device, kind: torch.dtype, mappings: Mappings
) -> nn.Parameter:
    if weight.device == device and weight.dtype == kind:
        return weight
    moved = nn.Parameter(weight.detach().to(device, kind), weight.requires_grad)
    release_pages(weight, mappings)
    return moved


def _in_float32(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """The residual stream that begins with embeddings is float32."""
    return output.float()


@contextmanager
def exact_products(module: nn.Module) -> Iterator[None]:
    """Within it, weights kept in bfloat16 or 4 bits are multiplied in float32, without autocast."""
    quantised = [part for part in module.modules() if hasattr(part, "compute_dtype")]
    before = [part.compute_dtype for part in quantised]
    for part in quantised:
        part.compute_dtype = torch.float32  # type: ignore[assignment]
    try:
        with _Widened():
            yield
    finally:
        for part, kind in zip(quantised, before, strict=True):
            part.compute_dtype = kind


class _Widened(TorchFunctionMode):
    """Where float32 meets bfloat16, bfloat16 becomes float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinds = {x.dtype for x in args if isinstance(x, Tensor)}
        if {torch.float32, torch.bfloat16} <= kinds:
            low = torch.bfloat16
            args = [x.float() if isinstance(x, Tensor) and x.dtype == low else x for x in args]
        return func(*args, **(kwargs or {}))
