"""A layer and its adapters as one product: in float32 PEFT's bits, in bfloat16 nothing is lost."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from prefloop.data.batches import pack
from prefloop.generation.packed import _single
from prefloop.models import heads, lean
from prefloop.models.load import load_policy
from prefloop.models.low_rank import low_rank, summed
from tests.models.plain import gradients, random_examples
from tests.models.test_export import moved
from tests.models.test_load import folder_of
from tests.tiny import tiny_model

CPU = torch.device("cpu")
BF16 = torch.bfloat16


def a_layer(inputs=64, outputs=32, bias=False, rank=2, names=("default",)):
    """Base weights of about 1, and an adapter that adds some ten-thousandths of what they give."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    layer = inject_adapter_in_model(config, model, adapter_name=names[0])[0]
    for name in names[1:]:
        layer.update_layer(name, rank, rank, config)
    layer.set_adapter(list(names))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name in names:
            layer.lora_B[name].weight.mul_(2e-4)
    return layer


def products(layer, x):
    """By PEFT's module, as one product, and as the sampler has it."""
    with torch.autocast("cpu", BF16):
        return layer(x), summed(layer, low_rank(layer))(x), _single(layer, BF16)(x)


def test_what_is_below_half_a_step_is_lost_by_two_roundings_alone():
    """By hand: 256 has steps of 2 in bfloat16; 0.75 on 256.5 is lost once that is 256.

    256.5 -> 256, and 256 + 0.75 -> 256; but 257.25 -> 258 (halfway is 257).
    """
    layer = a_layer(inputs=2, outputs=1, rank=1)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[256.0, 0.5]]))
        layer.lora_A["default"].weight.copy_(torch.tensor([[0.0, 0.75]]))
        layer.lora_B["default"].weight.fill_(1.0)
        twice, once, sampled = products(layer, torch.ones(1, 2))
    assert twice.item() == 256
    assert once.item() == sampled.item() == 258


@pytest.mark.parametrize("names", [("default",), ("default", "second")])
@pytest.mark.parametrize("bias", [False, True])
def test_small_changes_come_through_on_the_mean(names, bias):
    """Along what the adapters add: all of it by one rounding, less than a third by two."""
    layer = a_layer(names=names, bias=bias)
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    with torch.no_grad():
        forms = products(layer, x)
        with torch.autocast("cpu", BF16):
            base = layer.base_layer(x)
        weights = [
            layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n].weight for n in names
        ]
        part = x.float() @ sum(weights).T
    shares = [(((form - base).float() * part).sum() / part.square().sum()).item() for form in forms]
    assert shares[0] < 0.4
    assert shares[1:] == pytest.approx([1.0, 1.0], abs=0.15)


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_learns_by_the_same_formula(tmp_path, bias):
    """float32: the bits of PEFT's modules. bfloat16: gradients as near to float32's as PEFT's."""
    errors = {True: 0.0, False: 0.0}
    for seed in range(3):
        base = folder_of(tmp_path / str(seed), tiny_model(seed=seed, attention_bias=bias))
        torch.manual_seed(seed)
        model = moved(load_policy(base, CPU, lora_rank=3))
        exact, by_exact = found(model, "float32", as_peft=True)
        ours, by_ours = found(model, "float32", as_peft=False)
        assert torch.equal(exact, ours)
        assert torch.allclose(by_exact, by_ours, rtol=1e-4, atol=1e-5)
        for as_peft in errors:
            _, gradient = found(model, "bfloat16", as_peft)
            errors[as_peft] += ((gradient - by_exact).norm() / by_exact.norm()).item() / 3
    assert 0 < errors[False] < 1.1 * errors[True] < 0.05


def found(model, dtype, as_peft):
    """Log-probs of a batch, and the gradient of all adapters."""
    how = replace(model, dtype=dtype, lean=None if as_peft else lean.Lean())
    log_probs = heads.answer_log_probs(how, pack(random_examples()))
    each = gradients(model.hf, log_probs).values()
    return log_probs.detach(), torch.cat([g.flatten().float() for g in each if g is not None])
