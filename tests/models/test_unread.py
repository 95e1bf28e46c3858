"""Models that stay in their file until they are divided (tests/training/test_sharding.py)."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from prefloop.data.batches import pack
from prefloop.models.four_bits import read_in_bytes
from prefloop.models.heads import answer_log_probs
from prefloop.models.load import load_policy
from prefloop.models.unread import beyond, decoder_layers, one_of_each, read
from prefloop.models.weights import Storage, frozen_copy, kept
from tests.models.plain import random_examples
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SLIDING, FULL = "sliding_attention", "full_attention"


def drawn(config):
    return AutoModelForCausalLM.from_config(config)


def test_one_layer_of_each_kind_is_read():
    """By their modules, a mixture behind a plain one, and by their settings, such as windows."""
    alike = Qwen3Config(num_hidden_layers=5, **SMALL)
    assert one_of_each(drawn(alike)) == 1
    kinds = [SLIDING, SLIDING, FULL, SLIDING, FULL]
    windows = Qwen3Config(
        num_hidden_layers=5, layer_types=kinds, sliding_window=4, use_sliding_window=True, **SMALL
    )
    assert one_of_each(drawn(windows)) == 3
    mixture = Qwen3MoeConfig(
        num_hidden_layers=5,
        mlp_only_layers=[0, 1],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        **SMALL,
    )
    assert one_of_each(drawn(mixture)) == 3


def test_layers_that_the_configuration_does_not_count_are_read():
    module = drawn(Qwen3Config(num_hidden_layers=5, **SMALL))
    module.config.num_hidden_layers = 4
    assert one_of_each(module) is None
    assert beyond(module, None) == set()


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer(chat=False).save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("storage", "trained", "lora_rank"),
    [
        (Storage("float32"), True, 0),
        (Storage("bfloat16", "bfloat16"), True, 0),
        (Storage("bfloat16"), True, 2),
        (Storage("float32", "nf4"), True, 2),
    ],
)
def test_what_is_read_later_is_the_model(folder, storage, trained, lora_rank):
    """Log-probs to the bit; until then the second layer's matrices hold nothing."""
    if storage.weights == "nf4":
        pytest.importorskip("bitsandbytes")

    def load(divided):
        torch.manual_seed(0)
        more = {"lora_rank": lora_rank, "divided": divided}
        return load_policy(folder, CPU, storage, trained=trained, **more)

    at_once, later = load(False), load(True)
    assert len(later.unread) == 7  # of an attention 4, of an MLP 3
    named = dict(later.module.named_parameters())
    waiting = [name for name, p in named.items() if p in later.unread]
    assert all(".layers.1." in name for name in waiting)
    assert all(named[name].untyped_storage().nbytes() <= 4 for name in waiting)
    for layer in decoder_layers(later.module):
        read_in_bytes(layer, later.unread)
        read(layer, later.unread)
    assert later.unread == {}
    batch = pack(random_examples())
    assert torch.equal(answer_log_probs(at_once, batch), answer_log_probs(later, batch))


@pytest.mark.parametrize("arch", ["gemma3", "gpt2", "mixture"])
def test_other_architectures_are_read_later(arch, tmp_path):
    """Layers of two kinds, layers that are no nn.Linear, experts stacked in one tensor."""
    if arch == "mixture":
        shape = SMALL | {"vocab_size": len(tiny_tokenizer())}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        torch.manual_seed(0)
        module = drawn(Qwen3MoeConfig(num_hidden_layers=3, **experts, **shape))
    else:
        module = tiny_model(arch, layers=3)
    module.save_pretrained(tmp_path)
    tiny_tokenizer(chat=False).save_pretrained(tmp_path)
    at_once = load_policy(str(tmp_path), CPU, trained=True)
    later = load_policy(str(tmp_path), CPU, trained=True, divided=True)
    first = one_of_each(later.module)
    assert first == (2 if arch == "gemma3" else 1)
    layers = decoder_layers(later.module)
    assert later.unread.keys() == {
        p for layer in layers[first:] for p in layer.parameters() if p.ndim > 1
    }
    read(later.module, later.unread)
    assert (later.packed, later.lean) == (at_once.packed, at_once.lean)
    batch = pack(random_examples())
    assert torch.equal(answer_log_probs(at_once, batch), answer_log_probs(later, batch))


def test_a_frozen_copy_is_read_later_too(folder):
    """From the same file, in the type that it is kept in, while the policy's own may change."""
    policy = load_policy(folder, CPU, Storage("bfloat16"), trained=True, divided=True)
    plan = kept(Storage("bfloat16"), CPU, trained=False)
    module, unread = frozen_copy(policy.module, plan, policy.unread)
    assert len(unread) == 7
    read(policy.module, policy.unread)
    read(module, unread)
    own = dict(policy.module.named_parameters())
    types = set()
    for name, weight in module.named_parameters():
        assert torch.equal(weight, own[name].to(weight.dtype))
        assert own[name].dtype == torch.float32
        types.add(weight.dtype)
    assert types == {torch.float32, torch.bfloat16}
