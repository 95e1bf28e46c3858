"""Linear layers packed for generation: the same products, and plain layers again afterwards."""

import pytest
import torch
from torch import nn

from prefloop.data.batches import pack
from prefloop.generation.packed import packed_linears
from prefloop.models import adapters, heads
from tests.models.plain import (
    assert_close,
    loaded,
    plain_log_probs,
    random_examples,
    with_plain_twin,
)
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


PARTS = [
    "",
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("name", PARTS)
@torch.no_grad()
def test_hooked_parts_are_called(name, before):
    """As sharding hooks layers: each call is seen, and what the hook makes of it counts."""
    model, plain = with_plain_twin(tiny_model("llama"))
    seen = []

    def halved(part, args, output=None):
        seen.append(part)
        if output is None:
            return None
        return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2

    for hf in (model.hf, plain):
        part = hf.model.layers[1].get_submodule(name)
        part.register_forward_pre_hook(halved) if before else part.register_forward_hook(halved)
    batch = pack(random_examples())
    with packed_linears(model.hf, torch.float32):
        ours = heads.answer_log_probs(model, batch)
    assert seen
    assert_close(ours, plain_log_probs(plain, random_examples()), 1e-4)


@torch.no_grad()
def test_weights_of_other_kinds_are_left_alone():
    """A weight that is no plain tensor (quantised, sharded) is multiplied by its own layer only."""

    class Sharded(nn.Parameter):
        pass

    model, plain = with_plain_twin(tiny_model("llama"))
    part = model.hf.model.layers[0]
    part.mlp.up_proj.weight = Sharded(part.mlp.up_proj.weight.data)
    part.input_layernorm.weight = Sharded(part.input_layernorm.weight.data)
    with packed_linears(model.hf, torch.float32):
        assert "joined" not in vars(part.mlp) and "forward" not in vars(part.mlp.up_proj)
        assert "joined" in vars(part.self_attn)
        ours = heads.answer_log_probs(model, pack(random_examples()))
    assert_close(ours, plain_log_probs(plain, random_examples()), 1e-4)
