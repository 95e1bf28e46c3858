"""Linear layers with their weights laid out as oneDNN reads them, while answers are generated.

A decode step multiplies a few rows by every weight, and is bound by how fast those are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefloop.models.lean import LEAN_NAMES, Joined, has_plain_weight, is_hooked


@contextmanager
def packed_linears(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it, the CPU's plain linear layers compute in `dtype` from a packed copy.

    Weights must not change meanwhile. Other devices and types, and processors that oneDNN does not
    serve, keep the layers as they are.
    """
    linears: list[Any] = [part for part in module.modules() if _is_plain(part)]
    if not linears or linears[0].weight.device.type != "cpu" or not _serves(dtype):
        yield
        return
    joined = [part for part in module.modules() if _joinable(part)]
    for part in joined:
        layers = _layers(part)
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        sizes = tuple(layer.out_features for layer in layers)
        vars(part)["joined"] = Joined(_packed(weight, bias, dtype), sizes)
    inside = {layer for part in joined for layer in _layers(part)}
    single = [linear for linear in linears if linear not in inside]
    for linear in single:
        vars(linear)["forward"] = _packed(linear.weight, linear.bias, dtype)
    try:
        yield
    finally:
        for linear in single:
            del vars(linear)["forward"]
        for part in joined:
            del vars(part)["joined"]


def _serves(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    halves = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(halves or dtype == torch.float32)


def _layers(part: nn.Module) -> list[Any]:
    """The layers that a lean part lets read the same input."""
    names = LEAN_NAMES.get(getattr(vars(part).get("forward"), "__func__", None), ())
    return [getattr(part, name) for name in names]


def _is_plain(part: nn.Module) -> bool:
    """A linear layer that is neither quantised nor sharded."""
    return type(part) is nn.Linear and has_plain_weight(part)


def _joinable(part: nn.Module) -> bool:
    """Whether they are plain and without hooks: adapters add to each on its own."""
    layers = _layers(part)
    plain = bool(layers) and all(_is_plain(layer) and not is_hooked(layer) for layer in layers)
    return plain and len({layer.bias is None for layer in layers}) == 1


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
