"""A linear layer and its low-rank adapters as one sum, rounded once.

PEFT adds what the adapters give to what the base gave. In bfloat16 that is a rounded number by
then, and whatever is below half a step of it is lost in the sum: every time, for a number that has
been rounded lies on the grid. Added within the base's product, before its sums are rounded, it
moves the result as often as its size asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from prefloop.models.precision import product_dtype


class LowRank(NamedTuple):
    """What a layer with plain LoRA computes: base(x), and up(down(x)) * scale of each adapter."""

    base: nn.Module
    halves: tuple[nn.Module, ...]  # down and up of each
    scales: tuple[float, ...]


def low_rank(layer: nn.Module) -> LowRank | None:
    """That of a layer, of the adapters that are on; None where it computes anything else."""
    if type(layer) is not LoraLinear or layer.merged:
        return None
    active = [] if layer.disable_adapters else layer.active_adapters
    names = [name for name in active if name in layer.lora_A]
    drops = [layer.lora_dropout[name] for name in names]
    if any(isinstance(drop, nn.Dropout) and drop.training and drop.p for drop in drops):
        return None
    if any(name in layer.lora_variant for name in names):
        return None
    halves = tuple(half[name] for name in names for half in (layer.lora_A, layer.lora_B))
    return LowRank(layer.base_layer, halves, tuple(layer.scaling[name] for name in names))


def parts_of(
    halves: Sequence[Callable[[Tensor], Tensor]], scales: Sequence[float], x: Tensor
) -> Iterator[Tensor]:
    """What each adapter adds to the base's product."""
    for down, up, scale in zip(halves[::2], halves[1::2], scales, strict=True):
        yield up(down(x)) * scale


def summed(layer: nn.Module, adapted: LowRank) -> Callable[[Tensor], Tensor]:
    """The layer (a plain base beneath it) as one product; in float32 as PEFT computes it."""
    base: Any = adapted.base

    def forward(x: Tensor) -> Tensor:
        if product_dtype(x) == torch.float32:
            return layer(x)  # type: ignore[no-any-return]
        rows = x.flatten(0, -2)
        part = reduce(torch.add, parts_of(adapted.halves, adapted.scales, rows))
        output: Tensor = torch.addmm(part, rows, base.weight.t())
        if base.bias is not None:
            output = output + base.bias.to(output.dtype)
        return output.reshape(*x.shape[:-1], -1)

    return forward
