"""Layers in 4 bits (NF4) whose bytes are divided among ranks.

bitsandbytes keeps a layer's packed weights as its parameter and the scales of their blocks beside
it. Here both are parameters, so that FSDP cuts them anywhere, within a block too, and puts them
together as bytes before the layer computes, and again for its backward pass. What is computed is
bitsandbytes' own, to the bit. The scales' scales (4 bytes for 16,384 weights) stay on each rank.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from prefloop.models.weights import bitsandbytes

SCALES = ".block_scales"
"""How the names of parameters end that are none where a layer is whole."""


class InBytes(nn.Linear):
    """A linear layer with its weights in 4 bits and their scales as plain parameters of bytes."""

    def __init__(self, layer: Any) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.compute_dtype = layer.compute_dtype
        packed, self.form = layer.weight.detach(), copy.copy(layer.weight.quant_state)
        self.weight = nn.Parameter(packed.as_subclass(Tensor), False)  # uint8 [in * out / 2, 1]
        self.block_scales = nn.Parameter(self.form.absmax, False)  # uint8 [in * out / 64]
        self.bias = layer.bias
        self.form.absmax = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        form = copy.copy(self.form)
        form.absmax = self.block_scales
        kind = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(kind)
        multiply = bitsandbytes("--weights nf4").matmul_4bit
        product: Tensor = multiply(x.to(kind), self.weight, quant_state=form, bias=bias)
        return product.to(x.dtype)


def put_in_bytes(module: nn.Module) -> None:
    """Replaces all layers in 4 bits."""
    for part in list(module.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear) and hasattr(layer.weight, "quant_state"):
                setattr(part, name, InBytes(layer))
