"""Linear layers with their weights laid out as oneDNN reads them, while answers are generated.

A decode step multiplies a few rows by every weight, and is bound by how fast those are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from prefloop.models import adapters
from prefloop.models.lean import (
    Joined,
    Linear,
    Linears,
    Stack,
    forward_of,
    has_plain_weight,
    must_be_called,
)
from prefloop.models.model import LoadedModel

FEW = 0.05  # of all weights: below, to look at every operation costs more than it saves


@dataclass(frozen=True)
class Packed:
    """The packed layers of a model: those handed to a Stack, and others that modules call.

    They hold while weights stand still.
    """

    linears: Linears = field(default_factory=Linears)
    others: Mapping[int, Linear] = field(default_factory=dict)  # by the id of the weight
    layers: frozenset[nn.Module] = frozenset()  # all of them

    def among_others(self) -> AbstractContextManager[Any]:
        """Within it, layers that no Stack is handed multiply by their packed weights, too."""
        return _Products(self.others) if self.others else nullcontext()


def pack_linears(model: LoadedModel, dtype: torch.dtype) -> Packed:
    """Packed copies of the model's plain linear layers, which compute in `dtype`.

    On other devices, for other types, and on processors that oneDNN does not serve, there are none.
    """
    plain: list[Any] = [part for part in model.module.modules() if _is_plain(part)]
    if not plain or model.device.type != "cpu" or not _serves(dtype):
        return Packed()
    forward = forward_of(model.base, model.lean)
    groups = forward.groups if isinstance(forward, Stack) else []
    done: set[nn.Module] = set()
    joined, single = {}, {}
    alone: list[Any] = [model.hf.get_output_embeddings()]
    for group in groups:
        layers = [getattr(group.part, name) for name in group.together]
        alone.append(getattr(group.part, group.after))
        if _joinable(layers):
            joined[group.part] = _joined(layers, dtype)
            done.update(layers)
        else:
            alone += layers
    for layer in alone:
        if (found := _single(layer, dtype)) is not None:
            single[layer] = found
            done.update(layer.modules())
    left = [part for part in plain if part not in done]
    if sum(map(_size, left)) < FEW * sum(map(torch.numel, model.module.parameters())):
        left = []
    others = {id(part.weight): _packed(part.weight, part.bias, dtype) for part in left}
    return Packed(Linears(single, joined), others, frozenset({*done, *left}))


def packed_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the packed copy on the CPU; 0 where there is none."""
    plain: list[Any] = [part for part in module.modules() if _is_plain(part)]
    return dtype.itemsize * sum(part.weight.numel() for part in plain) if _serves(dtype) else 0


def _serves(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    halves = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(halves or dtype == torch.float32)


def _is_plain(part: nn.Module) -> bool:
    """A linear layer that is neither quantised nor sharded."""
    return type(part) is nn.Linear and has_plain_weight(part)


def _size(layer: Any) -> int:
    return int(layer.weight.numel())


def _joinable(layers: list[Any]) -> bool:
    """Whether they are plain and without hooks: adapters add to each on its own."""
    plain = all(_is_plain(layer) and not must_be_called(layer) for layer in layers)
    return plain and len({layer.bias is None for layer in layers}) == 1


def _joined(layers: list[Any], dtype: torch.dtype) -> Joined:
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return Joined(_packed(weight, bias, dtype), tuple(layer.out_features for layer in layers))


def _single(layer: Any, dtype: torch.dtype) -> Linear | None:
    """What stands for this layer, with adapters or without; None where it must be called."""
    if must_be_called(layer):
        return None
    if _is_plain(layer):
        return _packed(layer.weight, layer.bias, dtype)
    found = adapters.low_rank(layer)
    if found is None:
        return None
    layers: list[Any] = [found.base, *found.halves]
    if not all(_is_plain(part) and not must_be_called(part) for part in layers):
        return None
    base, *halves = (_packed(x.weight, x.bias, dtype) for x in layers)
    added = list(zip(halves[::2], halves[1::2], found.scales, strict=True))

    def forward(x: Tensor) -> Tensor:
        output = base(x)
        for down, up, scale in added:
            output = output + up(down(x)) * scale
        return output

    return forward


@torch.no_grad()
def _packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    rows = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
    shift = None if bias is None else bias.detach().to(dtype)

    def forward(x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(dtype), rows, shift, "none", [], ""
        )
        return output

    return forward


class _Products(TorchFunctionMode):
    """Within it, `linear` multiplies by the packed form of a weight that has one."""

    def __init__(self, packed: Mapping[int, Linear]) -> None:
        super().__init__()
        self.packed = packed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation passes here; `nn.Linear` gives input and weight by position."""
        if func is linear and len(args) > 1:
            instead = self.packed.get(id(args[1]))
            if instead is not None:
                return instead(args[0])
        return func(*args, **(kwargs or {}))
