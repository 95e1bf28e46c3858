"""Runs on a base in 4 bits: beside separate models, resumed, read by plain PEFT, merged."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from prefloop.commands import export
from prefloop.config import ExportConfig
from prefloop.data.batches import pack
from prefloop.errors import UserError
from prefloop.models import heads
from prefloop.models.load import load_policy, load_scorer
from prefloop.models.weights import Storage
from tests.models.plain import plain_log_probs, random_examples
from tests.tiny import tiny_model
from tests.training.one_base import built, copied, stepped
from tests.training.small import CPU, assert_same_run, only_checkpoint, policy, train

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LORA = {"lora_rank": 2, "lora_alpha": 8.0, "weights": "nf4", "batch_size": 3, "lr": 0.02}
NF4 = Storage("float32", "nf4")
PPO = {"ppo_epochs": 2, "max_steps": 4}


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def four_bits(world, tmp_path_factory):
    """Runs of every method on the world's policy in 4 bits; PPO with the run's reward model."""
    folder = tmp_path_factory.mktemp("nf4")
    saving = {"save_every": 1, "keep_checkpoints": 9}
    for command in ("sft", "dpo", "reward"):
        train(command, world, folder / command, **LORA | saving)
    beside = {"reward_model": str(folder / "reward")}
    train("ppo", world, folder / "ppo", **LORA | saving | PPO | beside)
    return folder


@pytest.mark.parametrize("command", ["sft", "dpo", "reward", "ppo"])
def test_a_run_goes_on_to_the_same_bits(command, world, four_bits, tmp_path):
    only_checkpoint(four_bits / command, tmp_path / "again", 3 if command == "ppo" else 2)
    changes = PPO | {"reward_model": str(four_bits / "reward")} if command == "ppo" else {}
    train(command, world, tmp_path / "again", **LORA | changes)
    assert_same_run(four_bits / command, tmp_path / "again")


def test_a_run_in_bfloat16_goes_on_where_layers_have_biases(world, tmp_path):
    """Which bitsandbytes rounds in place when they are first added to a product in bfloat16."""
    model = tiny_model("llama", attention_bias=True)
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "model")
    policy(world).tokenizer.save_pretrained(tmp_path / "model")
    changes = LORA | {"model": str(tmp_path / "model"), "dtype": "bfloat16"}
    train("sft", world, tmp_path / "run", save_every=1, keep_checkpoints=9, **changes)
    only_checkpoint(tmp_path / "run", tmp_path / "again", 1)
    train("sft", world, tmp_path / "again", **changes)
    assert_same_run(tmp_path / "run", tmp_path / "again")


def test_steps_are_those_of_separate_models(world, four_bits, tmp_path, capsys):
    """Three in two iterations, to the tolerance that float32 bases have."""
    changes = {"weights": "nf4", "reward_model": str(four_bits / "reward")}
    one, config = built(world, tmp_path / "one", **changes)
    assert "carries policy, reward model" in capsys.readouterr().err
    apart, other = built(world, tmp_path / "apart", share_base="never", **changes)
    copied(one, apart)
    layers = [sum(type(p).__name__ == "Linear4bit" for p in m.hf.modules()) for m in (
        one.policy, apart.policy, apart.critic
    )]  # fmt: skip
    assert layers == [14, 14, 14]
    ours, theirs = stepped(one, config, 3), stepped(apart, other, 3)
    for mine, separate in zip(ours, theirs, strict=True):
        assert mine.keys() == separate.keys()
        for name, value in mine.items():
            assert value == pytest.approx(separate[name], rel=2e-5, abs=5e-6), name


def quantised(kind, path, **options):
    """As Transformers makes it, in training mode: else bitsandbytes takes less precise kernels."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "score"],
    )
    model = kind.from_pretrained(path, quantization_config=how, dtype=torch.float32, **options)
    return model.train()


@pytest.mark.parametrize("command", ["dpo", "ppo"])
def test_plain_peft_reads_the_adapter_onto_its_own_quantised_base(command, world, four_bits):
    folder = str(four_bits / command / "model")
    plain = quantised(AutoModelForCausalLM, world / "model")
    examples = random_examples()
    with torch.no_grad():
        before = plain_log_probs(plain, examples)
        expected = plain_log_probs(PeftModel.from_pretrained(plain, folder).train(), examples)
        ours = heads.answer_log_probs(load_policy(folder, CPU, NF4), pack(examples))
    assert (before - expected).abs().max() > 1e-2
    assert_close(ours, expected)


@pytest.mark.parametrize("path", ["reward/model", "ppo/value_model"])
def test_plain_peft_reads_scorers_onto_their_quantised_base(path, world, four_bits):
    """Scores at the last token of each answer."""
    folder = str(four_bits / path)
    plain = quantised(AutoModelForSequenceClassification, world / "model", num_labels=1)
    plain.config.pad_token_id = 0
    peft = PeftModel.from_pretrained(plain, folder).train()
    examples = random_examples()
    scorer = load_scorer(folder, CPU, NF4)
    with torch.no_grad():
        rows = [e.prompt + answer for e in examples for answer in e.answers]
        expected = [peft(input_ids=torch.tensor([row])).logits.item() for row in rows]
        ours = heads.answer_scores(scorer, pack(examples)) + heads.score_mean(scorer)
    assert_close(ours, torch.tensor(expected))


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_export_adds_the_adapter_to_the_base_as_it_was_before(command, world, four_bits, tmp_path):
    """W + s B A of plain PEFT on the float32 base, and not of weights that were in 4 bits."""
    merged = tmp_path / "merged"
    export(ExportConfig(run=str(four_bits / command), output=merged, merge=True))
    scorer = command == "reward"
    kind = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    options = {"num_labels": 1} if scorer else {}
    base = kind.from_pretrained(world / "model", dtype=torch.float32, **options)
    peft = PeftModel.from_pretrained(base, str(four_bits / command / "model"))
    expected = peft.merge_and_unload().state_dict()
    found = kind.from_pretrained(merged, dtype=torch.float32).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight, expected[name]), name


KINDS = {  # of adapters that can only be merged
    "dora": {"use_dora": True},
    "whole layers": {"modules_to_save": ["lm_head"]},
    "on another adapter": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k != "dora" else []) for k in KINDS]
)
def test_what_must_be_merged_is_refused_before_it_is_loaded(kind, world, four_bits, tmp_path):
    """Merged first, as the error says, it is trained, and its adapter is of the merged weights."""
    model, folder = tiny_model("llama"), tmp_path / "adapter"
    model.name_or_path = str(four_bits / "sft" / "model" if kind[0] == "o" else world / "model")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **KINDS[kind])
    get_peft_model(model, lora).save_pretrained(folder)
    load_policy(str(world / "model"), CPU).tokenizer.save_pretrained(folder)
    changes = LORA | {"model": str(folder), "max_steps": 1}
    with pytest.raises(UserError, match=r"adapter: its adapter must be merged, for its kind or"):
        train("sft", world, tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(UserError, match=r"merge it first, with prefloop export --merge"):
        load_policy(str(folder), CPU, NF4)
    export(ExportConfig(run=str(folder), output=tmp_path / "merged", merge=True))
    run = train("sft", world, tmp_path / "run", **changes | {"model": str(tmp_path / "merged")})
    examples = random_examples()
    with torch.no_grad():
        whole = load_policy(str(folder), CPU)
        merged = load_policy(str(tmp_path / "merged"), CPU)
        assert_close(*(heads.answer_log_probs(m, pack(examples)) for m in (whole, merged)))
        plain = quantised(AutoModelForCausalLM, tmp_path / "merged")
        expected = plain_log_probs(PeftModel.from_pretrained(plain, run.model).train(), examples)
        ours = heads.answer_log_probs(load_policy(str(run.model), CPU, NF4), pack(examples))
    assert_close(ours, expected)


def test_layers_trained_whole_on_an_adapter_need_it_merged(world, four_bits, tmp_path):
    """The adapter alone could stay apart."""
    changes = LORA | {
        "model": str(four_bits / "sft" / "model"),
        "modules_to_save": ("embed_tokens",),
    }
    with pytest.raises(UserError, match=r"model: its adapter must be merged, .*--modules-to-save"):
        train("sft", world, tmp_path / "run", **changes)


def test_a_run_on_an_adapter_trains_another_on_the_same_4_bits(world, four_bits, tmp_path):
    """Both are saved as one adapter of the world's policy."""
    changes = LORA | {"model": str(four_bits / "sft" / "model"), "max_steps": 2}
    run = train("dpo", world, tmp_path / "run", **changes)
    plain = quantised(AutoModelForCausalLM, world / "model")
    peft = PeftModel.from_pretrained(plain, run.model).train()
    assert peft.peft_config["default"].r == 4
    examples = random_examples()
    with torch.no_grad():
        expected = plain_log_probs(peft, examples)
        ours = heads.answer_log_probs(load_policy(str(run.model), CPU, NF4), pack(examples))
    assert_close(ours, expected)
