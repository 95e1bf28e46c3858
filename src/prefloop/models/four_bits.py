"""Linear layers in 4 bits (NF4, arXiv 2305.14314), whole or with bytes that ranks divide.

bitsandbytes keeps a layer's packed weights as its parameter and the scales of their blocks beside
it. In a divided model both are parameters, so that FSDP cuts them anywhere, within a block too, and
puts them together as bytes before the layer computes, and again for its backward pass. What is
computed is bitsandbytes' own, to the bit. The scales' scales (4 bytes for 16,384 weights) stay on
each rank.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from prefloop.errors import UserError, first_line
from prefloop.models.memory import file_mappings, release_pages
from prefloop.models.unread import Unread, stand_in

ASKED = "--weights nf4"
SCALES = ".block_scales"
"""How the names of parameters end that are none where a layer is whole."""
BLOCK = 64  # weights of one scale


def bitsandbytes(asked: str) -> Any:
    """The package; UserError where what was asked for needs it and it is not there."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(
            f"{asked} needs bitsandbytes ({first_line(error)}); pip install 'prefloop[quant]'"
        ) from error
    return bitsandbytes


def quantise(
    module: nn.Module,
    device: torch.device,
    products: torch.dtype,
    later: Collection[nn.Parameter] = frozenset(),
) -> Unread:
    """Puts linear layers in 4 bits: blocks of 64, their scales quantised again; no head among them.

    Those whose weights are to be read `later` are divided ones from the start.
    """
    output = getattr(module, "get_output_embeddings", lambda: None)()
    left = [part for part in (output, getattr(module, "score", None)) if part is not None]
    mappings, unread = file_mappings(), Unread()
    for part in list(module.modules()):
        for name, linear in list(part.named_children()):
            if type(linear) is not nn.Linear or any(linear is head for head in left):
                continue
            if linear.weight in later:
                layer: Any = InBytes(linear, products, device)
                unread[layer.weight] = linear.weight.detach()
            else:
                layer = _quantised(linear.weight.detach(), device, products)
                layer.bias = linear.bias
                release_pages(linear.weight, mappings)
            setattr(part, name, layer)
    return unread


def _quantised(weight: Tensor, device: torch.device, products: torch.dtype) -> Any:
    """bitsandbytes' layer of a weight [out, in]."""
    bnb = bitsandbytes(ASKED)
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=products, quant_type="nf4"
        )
    # What else it does on some processors without gradients loses the form with gradients.
    layer.support_avx512bf16_for_cpu = False
    stored = weight.to(products)
    layer.weight = bnb.nn.Params4bit(stored, quant_type="nf4", module=layer).to(device)
    return layer


class InBytes(nn.Linear):
    """A linear layer with its weights in 4 bits and their scales as plain parameters of bytes.

    Of a `linear` layer's shape and bias, without weights until it takes those of another.
    """

    weight: nn.Parameter

    def __init__(self, linear: nn.Linear, products: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = products
        self.form = bitsandbytes(ASKED).functional.QuantState(None)
        count = self.in_features * self.out_features
        shapes = torch.Size([-(-count // 2), 1]), torch.Size([-(-count // BLOCK)])
        self.weight, self.block_scales = (stand_in(s, device, torch.uint8, False) for s in shapes)
        self.bias = linear.bias

    def take(self, layer: Any) -> None:
        """The weights of bitsandbytes' layer. The form is filled: copies may share it."""
        packed, form = layer.weight.detach(), layer.weight.quant_state
        self.weight = nn.Parameter(packed.as_subclass(Tensor), False)  # uint8 [in * out / 2, 1]
        self.block_scales = nn.Parameter(form.absmax, False)  # uint8 [in * out / 64]
        vars(self.form).update(vars(form) | {"absmax": None})

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        form = copy.copy(self.form)
        form.absmax = self.block_scales
        kind = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(kind)
        multiply = bitsandbytes(ASKED).matmul_4bit
        product: Tensor = multiply(x.to(kind), self.weight, quant_state=form, bias=bias)
        return product.to(x.dtype)


def in_bytes(layer: Any) -> InBytes:
    """In place of bitsandbytes' layer."""
    divided = InBytes(layer, layer.compute_dtype, layer.weight.device)
    divided.take(layer)
    return divided


def put_in_bytes(module: nn.Module) -> None:
    """Replaces all layers in 4 bits."""
    for part in list(module.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear) and hasattr(layer.weight, "quant_state"):
                setattr(part, name, in_bytes(layer))


def read_in_bytes(module: nn.Module, unread: Unread) -> None:
    """Puts weights into a module's layers that wait for them, one at a time."""
    mappings = file_mappings()
    for part in module.modules():
        if isinstance(part, InBytes) and part.weight in unread:
            stored, device = unread.pop(part.weight), part.weight.device
            part.take(_quantised(stored, device, part.compute_dtype))
            release_pages(stored, mappings)
