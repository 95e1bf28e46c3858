"""Lean parts: the same bits as Transformers' own, and gradients of the same formula."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    MixtralConfig,
    OlmoConfig,
    Phi3Config,
)

from prefloop.data.batches import pack
from prefloop.models import heads, lean, operations
from tests.models.plain import (
    assert_same_gradients,
    gradients,
    loaded,
    random_examples,
    with_plain_twin,
)
from tests.tiny import tiny_model


def test_gradients_of_the_norm():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((2, 5, 7), (7,)))
    args = (x.requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, w: operations._RMSNorm.apply(x, w, 1e-3, x.dtype), args
    )
    expected = w * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    assert torch.allclose(operations._RMSNorm.apply(*args, 1e-3, x.dtype), expected, atol=1e-14)


def test_gradients_of_the_gate():
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    args = (gate.requires_grad_(), up.requires_grad_())
    assert torch.autograd.gradcheck(operations._Gated.apply, args)
    assert torch.allclose(operations._Gated.apply(*args), gate * gate.sigmoid() * up, atol=1e-14)


def test_rotation_by_hand():
    """Pairs (x1, x3) and (x2, x4) turn by their angles."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=torch.float64, requires_grad=True)
    angles = torch.tensor([[[0.3, 1.1, 0.3, 1.1]]], dtype=torch.float64)
    turned = operations._Rotated.apply(x, angles.cos(), angles.sin(), x.dtype)
    pairs = [complex(1, 3), complex(2, 4)]
    hand = [
        pair * complex(math.cos(a), math.sin(a)) for pair, a in zip(pairs, (0.3, 1.1), strict=True)
    ]
    expected = [*(z.real for z in hand), *(z.imag for z in hand)]
    assert turned.flatten().tolist() == pytest.approx(expected, abs=1e-14)
    tables = (angles.cos(), angles.sin())
    assert torch.autograd.gradcheck(lambda x: operations._Rotated.apply(x, *tables, x.dtype), (x,))


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_models_keep_their_numbers(arch, bfloat16, recompute):
    """Forward the same bits as by Transformers' modules, and the same gradients."""
    model, _ = with_plain_twin(tiny_model(arch))
    assert model.lean == lean.Lean()
    model.lean = lean.Lean(recompute=recompute)
    batch = pack(random_examples())

    def run():
        how = replace(model, dtype="bfloat16" if bfloat16 else "float32")
        return heads.answer_log_probs(how, batch)

    ours = run()
    by_ours = gradients(model.hf, ours)
    with torch.no_grad():
        assert torch.equal(run(), ours)
    model.lean = None
    theirs = run()
    assert torch.equal(ours, theirs)
    assert_same_gradients(by_ours, gradients(model.hf, theirs), 2e-2 if bfloat16 else 1e-5)


def test_layers_are_recomputed():
    """Of a layer's activations nothing is kept: the backward pass calls its linear layers again."""
    model = loaded(tiny_model("llama"))
    calls = []
    model.base.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    for recompute, after_forward, after_backward in ((False, 1, 1), (True, 1, 2)):
        calls.clear()
        model.lean = replace(model.lean, recompute=recompute)
        numbers = heads.answer_log_probs(model, pack(random_examples()))
        assert len(calls) == after_forward
        numbers.sum().backward()
        assert len(calls) == after_backward


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 268}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
SHAPE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PARTLY = {
    "granite": (GraniteConfig(**SHAPE, residual_multiplier=0.5, embedding_multiplier=2.0), "all"),
    "mixtral": (MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1), "attention"),
    "phi3": (Phi3Config(**SHAPE), "norms"),
    "olmo": (OlmoConfig(**SHAPE), "attention, mlp"),
    "gemma3": (tiny_model("gemma3").config, "nothing"),
    "gpt2": (tiny_model("gpt2").config, "nothing"),
}
"""Granite weighs what a layer adds. Experts, fused projections and layer norms are called. Gemma 3
has norms behind its parts, too; GPT-2 has no such part."""


@pytest.mark.parametrize(("config", "what"), PARTLY.values(), ids=PARTLY)
@pytest.mark.parametrize("bfloat16", [False, True])
def test_models_are_lean_where_they_can_be(config, what, bfloat16):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
        model = loaded(module.eval())
    assert found_lean(model) == what
    batch = pack(random_examples())

    def run():
        how = replace(model, dtype="bfloat16" if bfloat16 else "float32")
        return heads.answer_log_probs(how, batch)

    ours = run()
    by_ours = gradients(model.hf, ours)
    with torch.no_grad():
        assert torch.equal(run(), ours)
    model.lean = None
    theirs = run()
    assert torch.equal(ours, theirs)
    assert_same_gradients(by_ours, gradients(model.hf, theirs), 2e-2 if bfloat16 else 1e-5)


def found_lean(model):
    """What the stack of a model computes itself."""
    forward = lean.forward_of(model.base, model.lean)
    if not isinstance(forward, lean.Stack):
        return "nothing"
    layer = forward.layers[0]
    parts = {
        "norms": getattr(layer.norms[0], "func", None) is operations.rms_norm,
        "attention": isinstance(layer.attention, lean.Attention),
        "mlp": isinstance(layer.mlp, lean.MLP),
    }
    names = [name for name, ours in parts.items() if ours]
    if names == ["norms", "attention"]:  # a norm is that of the attention behind it
        names = ["attention"]
    return "all" if len(names) == 3 else ", ".join(names)


def test_a_saved_model_has_the_names_of_the_plain_one(tmp_path):
    model, plain = with_plain_twin(tiny_model("llama"))
    model.hf.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    for (name, x), (other, y) in zip(
        again.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(x, y)


@pytest.mark.parametrize("trains", [False, True])
def test_a_copy_computes_with_its_own_weights(trains):
    """PPO copies the policy as its reference."""
    model, _ = with_plain_twin(tiny_model("llama"))
    frozen = replace(model, module=copy.deepcopy(model.module))
    batch = pack(random_examples())
    with torch.set_grad_enabled(trains):
        before = heads.answer_log_probs(model, batch)
    with torch.no_grad():
        for parameter in model.trainable():
            parameter.mul_(1.5)
    with torch.set_grad_enabled(trains):
        assert torch.equal(heads.answer_log_probs(frozen, batch), before)
        assert not torch.equal(heads.answer_log_probs(model, batch), before)
