"""Adapters that PEFT itself wrote elsewhere load as PEFT reads them."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, FalconConfig, OlmoeConfig

from prefloop.data.batches import pack
from prefloop.data.tokenize import Example
from prefloop.errors import UserError, first_line
from prefloop.models import heads
from prefloop.models.export import export_model
from prefloop.models.load import load_policy, load_scorer
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import CPU

IDS = (10, 11, 12, 20, 21)


def written(folder, base, added=0, beside=True, **options):
    """A base folder, and an adapter of PEFT's own with moved weights."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    if added:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [f"<{i}>" for i in range(added)]}
        )
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.name_or_path = str(base)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    torch.manual_seed(0)
    for name, weight in peft.named_parameters():
        if weight.requires_grad and "magnitude" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    peft.save_pretrained(folder)
    if beside:
        tokenizer.save_pretrained(folder)
    return peft.eval()


@torch.no_grad()
def same(folder, peft, ids=IDS):
    model = load_policy(str(folder), CPU)
    batch = pack([Example(ids[:2], (ids[2:],), ((True,) * (len(ids) - 2),))])
    logits = peft(input_ids=torch.tensor([ids])).logits[0, 1:-1].log_softmax(-1)
    right = logits.gather(-1, torch.tensor(ids[2:])[:, None])[:, 0]
    torch.testing.assert_close(heads.answer_log_probs(model, batch), right, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "lora_alpha": 8},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["rslora", "dora", "head", "embeddings"],
)
@pytest.mark.filterwarnings("ignore")
def test_peft_options(options, tmp_path):
    same(tmp_path / "a", written(tmp_path / "a", tmp_path / "base", **options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_added_tokens(options, tmp_path):
    peft = written(tmp_path / "a", tmp_path / "base", added=3, **options)
    assert not (tmp_path / "a" / "config.json").exists()
    same(tmp_path / "a", peft, (*IDS, 270))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["../base", "base"])
def test_a_relative_base_is_sought_here_and_beside_the_adapter(name, tmp_path, monkeypatch):
    peft = written(tmp_path / "a", tmp_path / "base")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    monkeypatch.chdir(tmp_path if name == "base" else tmp_path.parent)
    same(tmp_path / "a", peft)


@pytest.mark.filterwarnings("ignore")
def test_a_base_that_is_gone_is_named(tmp_path):
    written(tmp_path / "a", tmp_path / "base")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"a: its base model .*base: not a model folder"):
        load_policy(str(tmp_path / "a"), CPU)


@pytest.mark.parametrize("path", ["./x", "/x/y", "runs/x", "a/b/c", "x/", "here/x"])
def test_what_can_only_be_a_path_is_told_without_asking_a_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for load in (load_policy, load_scorer):
        with pytest.raises(UserError, match="nothing is there; mend the path"):
            load(path, CPU)


def test_an_error_keeps_its_informative_line():
    assert first_line(ValueError("Errors in X:\n\tsize mismatch for w\n more")) == (
        "Errors in X: size mismatch for w"
    )
    assert first_line(ValueError("\nTraceback (most recent call last):\n  a\nKeyError: 1")) == (
        "KeyError: 1"
    )
    assert first_line(ValueError("  \n")) == "ValueError"


def test_a_class_that_transformers_lacks_is_told(tmp_path):
    config = OlmoeConfig(
        vocab_size=268,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no SequenceClassification of this architecture; give"):
        load_scorer(str(tmp_path), CPU)


def test_falcons_dropout_is_off_and_kept_in_the_export(tmp_path):
    config = FalconConfig(
        vocab_size=268,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.5,
        attention_dropout=0.5,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    model = load_policy(str(tmp_path / "m"), CPU, gradient_checkpointing=True)
    ids = torch.tensor([IDS])
    model.hf.train()
    with torch.no_grad():
        torch.testing.assert_close(model.hf(ids).logits, model.hf.eval()(ids).logits)
    export_model(model, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["hidden_dropout"], saved["attention_dropout"]) == (0.5, 0.5)
    assert model.hf.config.hidden_dropout == 0.0
