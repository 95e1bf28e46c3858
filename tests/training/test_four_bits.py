"""Layers in 4 bits as bytes, which ranks divide (tests/training/test_sharding.py)."""

import copy

import pytest
import torch

from prefloop.models.four_bits import InBytes, in_bytes, put_in_bytes
from prefloop.models.weights import Storage
from prefloop.training.checkpoint import weights_of
from tests.training.small import CPU, policy

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_bytes_compute_what_bitsandbytes_does(products):
    """To the bit, with the gradient of the input; 66 x 3 weights do not fill their blocks."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(66, 3, compute_dtype=products, quant_type="nf4").to(CPU)
    layer.support_avx512bf16_for_cpu = False
    ours, x = in_bytes(copy.deepcopy(layer)), torch.randn(5, 66, requires_grad=True)
    expected, found = layer(x), ours(x)
    assert torch.equal(expected, found)
    (wanted,), (grad,) = (torch.autograd.grad(y.square().sum(), x) for y in (expected, found))
    assert torch.equal(wanted, grad)
    assert grad.abs().sum() > 0
    assert {n: p.dtype for n, p in ours.named_parameters() if n != "bias"} == {
        "weight": torch.uint8,
        "block_scales": torch.uint8,
    }


def test_weights_are_the_same_ones_to_a_checkpoint(world):
    """A run goes on where its base is whole, and where it is divided."""
    model = policy(world, storage=Storage("float32", "nf4"), trained=True, lora_rank=2)
    before = weights_of(model.module)
    put_in_bytes(model.module)
    after = weights_of(model.module)
    assert sum(type(part) is InBytes for part in model.module.modules()) == 14
    assert len(before) == len(after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
