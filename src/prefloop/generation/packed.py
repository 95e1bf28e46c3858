"""Linear layers with their weights laid out as oneDNN reads them, while answers are generated.

A decode step multiplies a few rows by every weight, and is bound by how fast those are read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from prefloop.models.lean import (
    Joined,
    Linear,
    Linears,
    Stack,
    forward_of,
    is_plain,
    must_be_called,
    plain_low_rank,
)
from prefloop.models.low_rank import parts_of
from prefloop.models.model import LoadedModel

FEW = 0.05  # of all weights: fewer are not worth a copy of the modules


@dataclass(frozen=True)
class Packed:
    """A model with packed layers, for as long as weights stand still."""

    base: nn.Module  # without its head: the model's own, or a copy whose packed layers compute so
    head: Linear
    linears: Linears = field(default_factory=Linears)  # for a Stack of `base`
    layers: frozenset[nn.Module] = frozenset()  # the model's that are packed


def pack_linears(model: LoadedModel, dtype: torch.dtype) -> Packed:
    """Packed copies of the model's plain linear layers, which compute in `dtype`.

    On other devices, for other types, and on processors that oneDNN does not serve, there are none.
    """
    head: Any = model.hf.get_output_embeddings()
    plain: list[Any] = [part for part in model.module.modules() if is_plain(part)]
    if not plain or model.device.type != "cpu" or not _serves(dtype):
        return Packed(model.base, head)
    forward = forward_of(model.base, model.lean)
    groups = forward.groups if isinstance(forward, Stack) else []
    served: set[nn.Module] = set()
    joined, single = {}, {}
    alone: list[Any] = [head]
    # 1. Layers that a Stack multiplies by, and the head.
    for group in groups:
        layers = [getattr(group.part, name) for name in group.together]
        alone.append(getattr(group.part, group.after))
        if _joinable(layers):
            joined[group.part] = _joined(layers, dtype)
            served.update(layers)
        else:
            alone += layers
    for layer in alone:
        if (linear := _single(layer, dtype)) is not None:
            single[layer] = linear
            served.update(layer.modules())
    linears = Linears(single, joined)
    # 2. Layers that modules call.
    left: list[Any] = [x for x in model.base.modules() if is_plain(x) and x not in served]
    weights = sum(p.numel() for p in model.base.parameters())
    if sum(map(_size, left)) < FEW * weights or not _can_be_copied(model.base):
        return Packed(model.base, linears.of(head), linears, frozenset(served))
    others = [layer for layer in left if not must_be_called(layer)]
    base, linears = _copy(model.base, linears, {x: _PackedLinear(x, dtype) for x in others})
    return Packed(base, single.get(head, head), linears, frozenset({*served, *others}))


class _PackedLinear(nn.Linear):
    """A linear layer that multiplies by a packed copy of its weight."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.product = _packed(layer.weight, layer.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.product(x)


def _can_be_copied(base: nn.Module) -> bool:
    """Whether its hooks are plain functions, and bind nothing that a copy would have to copy."""
    hooks = [[*x._forward_hooks.values(), *x._forward_pre_hooks.values()] for x in base.modules()]
    return all(isinstance(hook, FunctionType) for some in hooks for hook in some)


def _copy(
    base: nn.Module, linears: Linears, packed: Mapping[nn.Module, nn.Module]
) -> tuple[nn.Module, Linears]:
    """The modules of `base` with packed layers among them, over the same weights."""
    known: dict[int, Any] = {id(x): x for x in chain(base.parameters(), base.buffers())}
    configs = [vars(part).get("config") for part in base.modules()]
    known |= {id(config): config for config in configs if config is not None}
    known |= {id(layer): instead for layer, instead in packed.items()}
    copied = copy.deepcopy(base, known)
    single = {known.get(id(x), x): y for x, y in linears.single.items()}
    joined = {known.get(id(x), x): y for x, y in linears.joined.items()}
    return copied, Linears(single, joined)


def packed_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the packed copy on the CPU; 0 where there is none."""
    plain: list[Any] = [part for part in module.modules() if is_plain(part)]
    return dtype.itemsize * sum(part.weight.numel() for part in plain) if _serves(dtype) else 0


def _serves(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    halves = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(halves or dtype == torch.float32)


def _size(layer: Any) -> int:
    return int(layer.weight.numel())


def _joinable(layers: list[Any]) -> bool:
    """Whether they are plain and without hooks: adapters add to each on its own."""
    plain = all(is_plain(layer) and not must_be_called(layer) for layer in layers)
    return plain and len({layer.bias is None for layer in layers}) == 1


def _joined(layers: list[Any], dtype: torch.dtype) -> Joined:
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return Joined(_packed(weight, bias, dtype), tuple(layer.out_features for layer in layers))


def _single(layer: Any, dtype: torch.dtype) -> Linear | None:
    """What stands for this layer, with adapters or without; None where it must be called."""
    if must_be_called(layer):
        return None
    if is_plain(layer):
        return _packed(layer.weight, layer.bias, dtype)
    adapted = plain_low_rank(layer)
    if adapted is None:
        return None
    layers: list[Any] = [adapted.base, *adapted.halves]
    base, *halves = (_packed(x.weight, x.bias, dtype) for x in layers)
    if not halves:
        return base

    def forward(x: Tensor) -> Tensor:
        parts = parts_of(halves, adapted.scales, x)
        if dtype == torch.float32:
            return reduce(torch.add, parts, base(x))
        return base(x, reduce(torch.add, parts))

    return forward


@torch.no_grad()
def _packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The product of x [..., in]; `part` [..., out] is added to it before it is rounded."""
    rows = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))
    shift = None if bias is None else bias.detach().to(dtype)

    def forward(x: Tensor, part: Tensor | None = None) -> Tensor:
        x, product = x.to(dtype), torch.ops.mkldnn._linear_pointwise
        if part is not None:
            return product.binary(x, part, rows, shift, "add")  # type: ignore[no-any-return]
        return product(x, rows, shift, "none", [], "")  # type: ignore[no-any-return]

    return forward
