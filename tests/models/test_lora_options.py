"""Which layers adapters stand on, what is trained whole beside them, and when they drop inputs."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from prefloop.config import PPOConfig, SFTConfig
from prefloop.config.checks import problems
from prefloop.data.batches import pack
from prefloop.data.tokenize import Example
from prefloop.errors import UserError
from prefloop.models import heads
from prefloop.models.adapters import active, adapter_dropout
from prefloop.models.export import export_model
from prefloop.models.load import load_policy, load_scorer
from tests.models.plain import assert_close, plain_log_probs, random_examples
from tests.models.test_export import log_probs, moved
from tests.models.test_load import folder_of
from tests.tiny import tiny_model
from tests.training.small import CPU

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
BLOCK = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
ALL = {f"model.layers.{n}.{name}" for n in (0, 1) for name in BLOCK}
ATTENTION = {f"model.layers.{n}.self_attn.{x}_proj" for n in (0, 1) for x in "qv"}


def with_adapters(module):
    names = [n for n, part in module.named_modules() if isinstance(part, LoraLayer)]
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("q_proj", "v_proj"), ATTENTION),
        ((r".*\.[qv]_proj",), ATTENTION),
        ((r"model\.layers\.1\..*q_proj",), {"model.layers.1.self_attn.q_proj"}),
        (("0.self_attn.q_proj",), {"model.layers.0.self_attn.q_proj"}),
        (("lm_head",), {"lm_head"}),
        (("all-linear", "lm_head"), ALL | {"lm_head"}),
        (("q_proj", "all-linear"), ALL),
    ],
)
def test_targets_are_names_or_one_expression(targets, layers, tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("llama", tie_word_embeddings=False))
    model = moved(load_policy(base, CPU, lora_rank=2, lora_targets=targets))
    assert with_adapters(model.module) == layers
    export_model(model, tmp_path / "out")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(log_probs(model), plain_log_probs(plain, random_examples()), 1e-5)
    assert_close(log_probs(load_policy(str(tmp_path / "out"), CPU)), log_probs(model), 1e-5)


THERE = "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"lora_targets": ("q_proj", "q_prj")}, f"--lora-targets q_prj: .* there are: {THERE}$"),
        ({"lora_targets": ("proj",)}, f"--lora-targets proj: .* there are: {THERE}$"),
        ({"lora_targets": (".*q_proj.+",)}, r"--lora-targets \.\*q_proj\.\+: .* has no such layer"),
        ({"lora_targets": ("norm",)}, "--lora-targets norm: .* has no such layer"),
        (
            {"modules_to_save": ("embed",)},
            "--modules-to-save embed: .* there are: .*, norm, o_proj",
        ),
        ({"modules_to_save": ("layers",)}, "--modules-to-save layers: .* has no such layer"),
    ],
)
def test_names_of_no_layer_are_told_with_what_there_is(options, line, tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("llama", tie_word_embeddings=False))
    with pytest.raises(UserError, match=line) as caught:
        load_policy(base, CPU, lora_rank=2, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "targets", [("q_proj", "lm_head"), (".*embed_tokens",), ("all-linear", "lm_head")]
)
def test_an_adapter_on_half_of_a_tied_weight_is_refused(targets, tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("llama", tie_word_embeddings=True))
    with pytest.raises(UserError, match="uses one weight for its embeddings and its head"):
        load_policy(base, CPU, lora_rank=2, lora_targets=targets)


def test_a_scorers_head_is_no_target(tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("llama"))
    with pytest.raises(
        UserError, match=r"--lora-targets score: .* there are: down_proj, embed_tok"
    ):
        load_scorer(base, CPU, lora_rank=2, lora_targets=("q_proj", "score"))
    scorer = load_scorer(base, CPU, lora_rank=2, modules_to_save=("embed_tokens",))
    whole = {n for n, p in scorer.module.named_parameters() if p.requires_grad and "lora" not in n}
    assert whole == {
        "base_model.model.score.modules_to_save.default.weight",
        "base_model.model.model.embed_tokens.modules_to_save.default.weight",
    }


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("llama", False), ("gpt2", False)])
@pytest.mark.parametrize("saved", ["embeddings", "head", "both"])
def test_modules_to_save(saved, tied, arch, tmp_path):
    """Trained, loaded by PEFT and merged with the same numbers; what is tied stays so."""
    start = tiny_model(arch, tie_word_embeddings=tied)
    embeddings = "wte" if arch == "gpt2" else "embed_tokens"
    names = {"embeddings": [embeddings], "head": ["lm_head"], "both": [embeddings, "lm_head"]}[
        saved
    ]
    base = folder_of(tmp_path / "base", start)
    model = moved(load_policy(base, CPU, lora_rank=2, modules_to_save=names))
    whole = [n for n, p in model.module.named_parameters() if p.requires_grad and "lora" not in n]
    assert len(whole) == (1 if tied else len(names))
    with torch.no_grad(), active(model.module, ()):
        assert_close(log_probs(model), plain_log_probs(start, random_examples()), 1e-5)
    export_model(model, tmp_path / "out")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        theirs = plain_log_probs(plain, random_examples())
    assert_close(log_probs(model), theirs, 1e-5)
    merged = load_policy(str(tmp_path / "out"), CPU)
    assert_close(log_probs(merged), theirs, 1e-5)
    assert (merged.hf.lm_head.weight is merged.hf.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", ["wte", "lm_head"])
def test_a_tied_weight_that_peft_does_not_keep_tied_is_refused(name, tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("gpt2", tie_word_embeddings=True))
    with pytest.raises(UserError, match=f"{name}: .* one weight for lm_head and wte, of which"):
        load_policy(base, CPU, lora_rank=2, modules_to_save=(name,))


def test_a_norm_may_be_trained_whole(tmp_path):
    """Also where a lean forward reads its weight without calling it."""
    base = folder_of(tmp_path / "base", tiny_model("llama"))
    model = moved(load_policy(base, CPU, lora_rank=2, modules_to_save=("input_layernorm",)))
    export_model(model, tmp_path / "out")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(log_probs(model), plain_log_probs(plain, random_examples()), 1e-5)
    with_gradients = heads.answer_log_probs(model, pack(random_examples())).detach()
    assert_close(with_gradients, log_probs(model), 1e-5)


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_is_pefts_own_within_its_place_and_nowhere_else(tmp_path):
    """The same masks as PEFT's, from one seed; off again afterwards, whatever mode is set."""
    base = folder_of(tmp_path / "base", tiny_model("llama"))
    model = moved(load_policy(base, CPU, lora_rank=2, lora_dropout=0.4))
    plain = get_peft_model(
        tiny_model("llama"),
        LoraConfig(r=2, lora_alpha=4, lora_dropout=0.4, target_modules="all-linear"),
    )
    with torch.no_grad():
        theirs = [p for p in plain.parameters() if p.requires_grad]
        for mine, own in zip(model.trainable(), theirs, strict=True):
            own.copy_(mine)
    ids = (10, 11, 12, 20, 21)
    batch = pack([Example(ids[:2], (ids[2:],), ((True,) * 3,))])
    without = heads.answer_log_probs(model, batch)
    before = torch.get_rng_state()
    with adapter_dropout([model.module], CPU, seed=3):
        dropped = heads.answer_log_probs(model, batch)
    assert torch.equal(torch.get_rng_state(), before)
    plain.train()
    torch.manual_seed(3)
    logits = plain(input_ids=torch.tensor([ids])).logits[0, 1:-1].log_softmax(-1)
    right = logits.gather(-1, torch.tensor(ids[2:])[:, None])[:, 0]
    assert_close(dropped, right, 1e-5)
    assert float((dropped - without).detach().abs().max()) > 1e-3
    model.module.train()
    assert torch.equal(heads.answer_log_probs(model, batch), without)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"lora_targets": ("q_proj", "v.*")}, "--lora-targets v.*: a regular expression stands al"),
        ({"lora_targets": ("(",)}, "--lora-targets (: not a regular expression"),
        ({"lora_targets": ()}, "--lora-targets names no layer"),
        (
            {"lora_targets": ("q_proj", "lm_head"), "modules_to_save": ("lm_head",)},
            "--lora-targets and --modules-to-save both name lm_head",
        ),
        (
            {"lora_rank": 0, "lora_targets": ("q_proj",)},
            "--lora-targets is read only with --lora-r",
        ),
        ({"lora_rank": 0, "lora_dropout": 0.1}, "--lora-dropout is read only with --lora-rank"),
        ({"lora_rank": 0, "modules_to_save": ("x",)}, "--modules-to-save is read only with --lora"),
        ({"lora_dropout": 1.0}, "--lora-dropout is 1.0; it must be in [0, 1)"),
    ],
)
def test_settings_that_cannot_be(settings, line, tmp_path):
    chosen = {"model": "m", "data": "d", "output": tmp_path, "lora_rank": 2} | settings
    assert any(told.startswith(line) for told in problems(SFTConfig(**chosen)))


def test_ppo_has_no_dropout(tmp_path):
    chosen = {"model": "m", "data": "d", "output": tmp_path, "reward_model": "r", "lora_rank": 2}
    assert list(problems(PPOConfig(**chosen))) == []
    [told] = problems(PPOConfig(**chosen, lora_dropout=0.1))
    assert told.startswith("--lora-dropout: PPO compares the policy with the one that sampled")
