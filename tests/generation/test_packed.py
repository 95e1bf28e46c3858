"""Linear layers packed for generation: the same products as by the layers themselves."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from prefloop.data.batches import pack
from prefloop.generation.engine import Engine
from prefloop.generation.packed import Packed, pack_linears
from prefloop.generation.sampler import Sampling
from prefloop.models import adapters, heads
from prefloop.models.attention.plan import PackedPlan
from prefloop.models.lean import Stack, forward_of
from tests.models.plain import (
    CPU,
    assert_close,
    loaded,
    plain_log_probs,
    random_examples,
    with_plain_twin,
)
from tests.tiny import tiny_model


def logits(model, packed=None):
    """Of a stream, as an engine computes them."""
    packed = packed or Packed(model.base, model.hf.get_output_embeddings())
    batch = pack(random_examples())
    forward = forward_of(packed.base, model.lean, packed.linears)
    with model.computing():
        plan = PackedPlan(batch.segments, CPU)
        hidden = forward(batch.input_ids, batch.position_ids, plan)
        return heads.logits(model, hidden, packed.head)


def counts(packed):
    """Layers joined, computed one by one by a stack or as head, and called by modules."""
    linears = packed.linears
    called = [part for part in packed.base.modules() if type(part).__name__ == "_PackedLinear"]
    return [len(linears.joined), len(linears.single), len(called)]


@pytest.mark.parametrize(
    ("arch", "expected"),
    {"llama": [4, 5, 0], "qwen3": [4, 5, 0], "gemma3": [0, 1, 14], "gpt2": [0, 1, 0]}.items(),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_products_are_the_same(arch, expected, dtype):
    """Two layers: q, k, v and gate, up joined; o, down and the head alone. GPT-2 has no others."""
    model = loaded(tiny_model(arch))
    model.dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
    packed = pack_linears(model, dtype)
    assert counts(packed) == expected
    plain, ours = logits(model), logits(model, packed)
    again = logits(model)
    bound = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert_close(ours, plain, bound)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@torch.no_grad()
def test_nothing_else_multiplies(arch):
    """In a stack, in modules that are called, in the head: the layers' own weights are unread."""
    model = loaded(tiny_model(arch, tie_word_embeddings=False))
    packed = pack_linears(model, torch.float32)
    expected = logits(model, packed)
    for layer in packed.layers:
        layer.weight.fill_(torch.nan)
    assert torch.equal(logits(model, packed), expected)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_nothing_is_left_in_the_model(arch):
    """While answers are written and afterwards, its modules are what they were."""
    model = loaded(tiny_model(arch))

    def look():
        return {n: (type(m), {*vars(m)}, {*m._modules}) for n, m in model.module.named_modules()}

    before, meanwhile = look(), []
    sampling = Sampling(max_new_tokens=3, temperature=1.0, stop_token_ids=frozenset())
    Engine(model, 2).generate(
        [(5, 6, 7)], 1, sampling, seed=0, on_tokens=lambda _: meanwhile.append(look())
    )
    assert meanwhile == [before] * 3
    assert look() == before


@torch.no_grad()
def test_modules_with_bound_hooks_are_not_copied():
    """Such as those of sharding, which know the modules they are of."""
    model = loaded(tiny_model("gemma3"))
    seen = []
    model.base.layers[0].mlp.register_forward_hook(lambda *_: seen.append("function"))
    packed = pack_linears(model, torch.float32)
    assert counts(packed) == [0, 1, 14] and packed.base is not model.base
    model.base.layers[0].register_forward_hook(partial(lambda *_: seen.append("bound")))
    packed = pack_linears(model, torch.float32)
    assert counts(packed) == [0, 1, 0] and packed.base is model.base
    logits(model, packed)
    assert seen == ["function", "bound"]


@torch.no_grad()
def test_changed_weights_are_packed_anew():
    model = loaded(tiny_model("llama"))
    before = logits(model, pack_linears(model, torch.float32))
    for parameter in model.trainable():
        parameter.mul_(1.1)
    after = logits(model, pack_linears(model, torch.float32))
    assert_close(after, logits(model), 1e-5)
    assert not torch.allclose(before, after, rtol=1e-2)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@torch.no_grad()
def test_adapters_still_count(arch):
    """The one that is on when the layers are packed, over the packed base; off, the base alone."""
    model = loaded(tiny_model(arch))
    module = model.module = adapters.add_lora(model.hf, 4, 8.0)
    module.add_adapter("other", module.peft_config["default"])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    found = []
    for name in ("default", "other"):
        module.set_adapter(name)
        packed = pack_linears(model, torch.float32)
        found.append(logits(model, packed))
        assert_close(found[-1], logits(model), 1e-5)
    with adapters.active(module, ()):
        packed = pack_linears(model, torch.float32)
        found.append(logits(model, packed))
        assert_close(found[-1], logits(model), 1e-5)
    assert len(packed.linears.single) == (15 if arch == "llama" else 1)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(found[i], found[j], rtol=1e-2)


@torch.no_grad()
def test_adapters_of_another_kind_are_called():
    """DoRA scales what it adds to: its layers compute themselves."""
    model = loaded(tiny_model("llama"))
    config = LoraConfig(r=4, target_modules=["v_proj", "up_proj"], use_dora=True)
    with adapters.quiet():
        model.module = get_peft_model(model.hf, config)
    for name, parameter in model.module.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter += 0.1
    packed = pack_linears(model, torch.float32)
    assert counts(packed)[:2] == [0, 11]  # 2 x (q, k, o, gate, down) and the head
    assert_close(logits(model, packed), logits(model), 1e-5)


def test_other_types_are_left_alone():
    model = loaded(tiny_model("llama"))
    assert pack_linears(model, torch.float64) == Packed(model.base, model.hf.lm_head)


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
    ours = logits(model, pack_linears(model, torch.float32))
    assert seen
    rows = pack(random_examples()).paths()
    ids = pack(random_examples()).input_ids
    for path in rows:
        assert_close(ours[path], plain(input_ids=ids[path][None]).logits[0], 1e-4)


@pytest.mark.parametrize("trains", [False, True])
def test_hooked_parts_are_called_in_training(trains):
    model, plain = with_plain_twin(tiny_model("llama"))
    for hf in (model.hf, plain):
        hf.model.layers[1].mlp.register_forward_hook(lambda part, args, output: output / 2)
    assert not isinstance(forward_of(model.base, model.lean), Stack)
    with torch.set_grad_enabled(trains):
        ours = heads.answer_log_probs(model, pack(random_examples()))
    assert_close(ours, plain_log_probs(plain, random_examples()), 1e-4)


def test_an_engine_looks_for_hooks_once():
    """At the start of a generation, not in each of its steps."""
    model = loaded(tiny_model("llama"))
    looks = []

    class Looked(dict):
        def __bool__(self):
            looks.append(1)
            return False

    model.base.layers[0]._forward_hooks = Looked()
    counted = []
    for tokens in (2, 20):
        looks.clear()
        sampling = Sampling(max_new_tokens=tokens, temperature=1.0, stop_token_ids=frozenset())
        Engine(model, 2).generate([(5, 6, 7), (8,)], 1, sampling, seed=0)
        counted.append(len(looks))
    assert counted[0] == counted[1] > 0


@torch.no_grad()
def test_weights_of_other_kinds_are_left_alone():
    """A weight that is no plain tensor (quantised, sharded) is multiplied by its own layer only."""

    class Sharded(nn.Parameter):
        pass

    model, plain = with_plain_twin(tiny_model("llama"))
    part = model.hf.model.layers[0]
    part.mlp.up_proj.weight = Sharded(part.mlp.up_proj.weight.data)
    part.input_layernorm.weight = Sharded(part.input_layernorm.weight.data)
    packed = pack_linears(model, torch.float32)
    assert part.mlp.up_proj not in packed.layers and part.mlp not in packed.linears.joined
    assert part.self_attn in packed.linears.joined and part.mlp.gate_proj in packed.layers
    assert_close(logits(model, packed), logits(model), 1e-5)
    ours = heads.answer_log_probs(model, pack(random_examples()))
    assert_close(ours, plain_log_probs(plain, random_examples()), 1e-4)
