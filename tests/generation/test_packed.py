"""Linear layers packed for generation: the same products, and plain layers again afterwards."""

import pytest
import torch
from torch import nn

from prefloop.generation.packed import packed_linears
from prefloop.models import adapters
from tests.models.plain import loaded
from tests.tiny import tiny_model


def hidden(model, ids):
    """Through the norms and MLPs of all layers, without attention."""
    x = model.hf.get_input_embeddings()(ids)
    for layer in model.base.layers:
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.hf.lm_head(x)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_products_are_the_same(arch, dtype):
    model = loaded(tiny_model(arch))
    ids = torch.arange(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        plain = hidden(model, ids)
        with packed_linears(model.hf, dtype):
            packed = hidden(model, ids)
        again = hidden(model, ids)
    assert packed.dtype == plain.dtype
    bound = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(packed, plain, atol=bound, rtol=bound)
    assert torch.equal(again, plain)


@torch.no_grad()
def test_changed_weights_are_packed_anew():
    model = loaded(tiny_model("llama"))
    ids = torch.arange(7)
    with packed_linears(model.hf, torch.float32):
        before = hidden(model, ids)
    for parameter in model.trainable():
        parameter.mul_(1.1)
    with packed_linears(model.hf, torch.float32):
        after = hidden(model, ids)
    torch.testing.assert_close(after, hidden(model, ids), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before, after, rtol=1e-2)


@torch.no_grad()
def test_adapters_still_count():
    """Only plain layers are joined; an adapter's base is packed on its own."""
    model = loaded(tiny_model("llama"))
    model.module = adapters.add_lora(model.hf, 4, 8.0)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.arange(7)
    plain = hidden(model, ids)
    with adapters.without_adapters(model.module):
        base = hidden(model, ids)
    with packed_linears(model.module, torch.float32):
        packed = hidden(model, ids)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(base, plain, rtol=1e-2)


def test_other_types_are_left_alone():
    model = loaded(tiny_model("llama"))
    with packed_linears(model.hf, torch.float64):
        assert "forward" not in vars(model.hf.lm_head)
