"""What cannot pack takes padded batches, and what is not exact there is refused."""

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    RecurrentGemmaConfig,
    StableLmConfig,
)

from prefloop.data.batches import pack
from prefloop.errors import UserError
from prefloop.models import heads, selftest
from prefloop.models.attention import varlen as varlen_attention
from prefloop.models.attention.plan import NAME
from tests.models.plain import (
    CPU,
    assert_close,
    assert_same_gradients,
    gradients,
    loaded,
    plain_log_probs,
    plain_scores,
    random_examples,
    tiny_scorer,
    varlen_by_hand,
    with_plain_twin,
)
from tests.tiny import tiny_model

SMALL = {
    "vocab_size": 268,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 4,
    "initializer_range": 0.2,
}
HEADS = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
ROPE = {**HEADS, "max_position_embeddings": 512}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}
LATENT |= {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "num_key_value_heads": 4}
MIXER = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}

PADDED = {
    "bloom": BloomConfig(**SMALL, n_head=4),
    "mamba": MambaConfig(**SMALL, state_size=4),
    "gemma2": Gemma2Config(**ROPE, head_dim=8, sliding_window=6, attn_logit_softcapping=2.0),
    "stablelm": StableLmConfig(**ROPE),
    "llama4": Llama4TextConfig(**ROPE, **MOE, intermediate_size_mlp=48, attention_chunk_size=6),
}
PACKED = {
    "mixtral": MixtralConfig(**ROPE, **MOE, sliding_window=6),
    "phi3": Phi3Config(**ROPE, sliding_window=6),
    "deepseek": DeepseekV3Config(**{**ROPE, **LATENT}),
}
HEAD_SCALES = {
    "granite": GraniteConfig(**ROPE, logits_scaling=3.0),
    "cohere": CohereConfig(**ROPE, logit_scale=0.3),
    "gemma2": Gemma2Config(**ROPE, head_dim=8, final_logit_softcapping=2.0),
    "falcon_h1": FalconH1Config(**ROPE, **MIXER, mamba_chunk_size=8, lm_head_multiplier=0.4),
    "recurrent_gemma": RecurrentGemmaConfig(
        **{**HEADS, "num_hidden_layers": 3, "lru_width": 32, "logits_soft_cap": 2.0}
    ),
}


def from_config(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


@pytest.mark.parametrize("config", PADDED.values(), ids=PADDED)
def test_what_cannot_pack_is_padded_and_exact(config, caplog):
    with caplog.at_level(logging.INFO):
        model, plain = with_plain_twin(from_config(config))
    assert not model.packed
    message = "tiny takes padded batches: packed attention is not exact for it"
    assert [record.message for record in caplog.records] == [message]
    examples = random_examples()
    ours = heads.answer_log_probs(model, pack(examples))
    theirs = plain_log_probs(plain, examples)
    assert_close(ours, theirs, 1e-5)
    assert_same_gradients(gradients(model.hf, ours), gradients(plain, theirs), 1e-5)


@torch.no_grad()
def test_padded_scores():
    scorer = tiny_scorer("gemma3")
    model, plain = with_plain_twin(scorer)
    examples = random_examples()
    packed = heads.answer_scores(model, pack(examples))
    model.packed = False
    model.hf.set_attn_implementation("sdpa")
    padded = heads.answer_scores(model, pack(examples))
    assert_close(padded, plain_scores(plain, examples), 1e-5)
    assert_close(packed, padded, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", PACKED.values(), ids=PACKED)
def test_other_models_that_pack(config):
    """A sliding window with experts and with fused projections, and multi-head latent attention."""
    model, plain = with_plain_twin(from_config(config))
    examples = random_examples()
    assert model.packed
    ours = heads.answer_log_probs(model, pack(examples))
    assert_close(ours, plain_log_probs(plain, examples), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", HEAD_SCALES.values(), ids=HEAD_SCALES)
def test_logits_are_the_models_own(config):
    model, plain = with_plain_twin(from_config(config))
    ids = torch.arange(5, 15)
    hidden = plain.base_model(input_ids=ids[None]).last_hidden_state[0]
    assert_close(heads.logits(model, hidden), plain(input_ids=ids[None]).logits[0], 1e-6)


def test_a_window_that_only_the_mask_knows_is_found():
    """At the test's length a window of 4,096 tokens hides nothing, so it is narrowed meanwhile."""
    module = tiny_model("gemma3", sliding_window=4096)
    module.model.layers[0].self_attn.sliding_window = None  # Transformers' mask still has it
    assert not loaded(module).packed
    assert module.config.sliding_window == 4096
    assert module.config._attn_implementation == "sdpa"


def test_windows_are_put_back():
    for width in (6, 4096):
        module = tiny_model("gemma3", sliding_window=width)
        assert loaded(module).packed
        assert module.config.sliding_window == width
        assert module.model.layers[0].self_attn.sliding_window == width
        assert module.model.layers[1].self_attn.sliding_window is None


def test_layers_of_an_unknown_kind_are_refused():
    module = from_config(PADDED["stablelm"])
    module.config.layer_types = ["compressed_sparse_attention"] * 2
    with pytest.raises(UserError, match="tiny: StableLmForCausalLM has layers of a kind unknown"):
        loaded(module)


def test_models_that_see_later_tokens_are_refused():
    config = Gemma3TextConfig(**ROPE, head_dim=8, use_bidirectional_attention=True)
    with pytest.raises(UserError, match="tiny: Gemma3ForCausalLM sees later tokens"):
        loaded(from_config(config))


@pytest.mark.parametrize(
    "config",
    [
        HyperCLOVAXConfig(**ROPE, logits_scaling=3.0),  # Granite's name, but it multiplies
        BertConfig(**{**SMALL, "is_decoder": True}, num_attention_heads=4, intermediate_size=48),
    ],
    ids=["hyperclovax", "bert"],
)
def test_heads_that_are_not_understood_are_refused(config):
    with pytest.raises(UserError, match="computes its output from the hidden states in a way unk"):
        loaded(from_config(config))


def test_a_scorer_that_pools_otherwise_is_refused():
    module = tiny_scorer("llama")
    module.score = nn.Sequential(module.score, nn.Tanh())
    loaded(module)  # the head is run as it is
    module = tiny_scorer("llama")
    module.register_forward_hook(lambda part, given, output: output.logits.add_(1.0) and None)
    with pytest.raises(UserError, match="tiny: LlamaForSequenceClassification computes"):
        loaded(module)


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "bound"),
    [
        (LlamaConfig(**ROPE), None),
        (LlamaConfig(**{**ROPE, "max_position_embeddings": 16}, rope_parameters=DYNAMIC), 16),
        (Phi3Config(**ROPE, rope_parameters=LONG, original_max_position_embeddings=16), 16),
        (GPT2Config(vocab_size=268, n_embd=32, n_layer=1, n_head=4, n_positions=16), 16),
        (PADDED["bloom"], None),
        (PADDED["mamba"], None),
    ],
    ids=["llama", "dynamic", "longrope", "gpt2", "bloom", "mamba"],
)
@torch.no_grad()
def test_sequences_beyond_a_models_positions(config, bound):
    model = loaded(from_config(config))
    model.max_length = selftest.longest_exact(model.hf)
    assert model.max_length == bound
    heads.answer_log_probs(model, pack(random_examples([(8, (8, 8))])))
    longer = pack(random_examples([(8, (8, 9))]))
    if bound is None:
        heads.answer_log_probs(model, longer)
    else:
        with pytest.raises(
            UserError, match=r"^tiny: a sequence of 17 tokens, but .* 16 only; lower"
        ):
            heads.answer_log_probs(model, longer)


def test_a_packed_model_keeps_its_attention():
    model = loaded(tiny_model("llama"))
    assert model.device == CPU
    assert model.hf.config._attn_implementation == NAME


def test_flash_attention_is_taken_where_it_is_right(monkeypatch, caplog):
    """A kernel that sees a key too many, or that stops, is refused in a line."""

    def one_too_many(*args, **settings):
        return varlen_by_hand(*args, **settings | {"window_size": (-1, 1)})

    def refused(*args, **settings):
        raise RuntimeError("head dimension")

    monkeypatch.setattr(varlen_attention, "serves", lambda device: True)
    for kernel in (varlen_by_hand, one_too_many, refused):
        monkeypatch.setattr(varlen_attention, "varlen_attn", kernel)
        for arch in ("llama", "gemma3"):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                model = loaded(tiny_model(arch))
            assert model.varlen == (kernel is varlen_by_hand)
            assert [r.message for r in caplog.records] == (
                []
                if model.varlen
                else ["tiny: FlashAttention does not serve it; a slower form is used"]
            )
