"""Exported folders load in plain Transformers and PEFT with the same numbers."""

import json
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from prefloop.commands import sft
from prefloop.config import SFTConfig
from prefloop.data.batches import pack
from prefloop.data.tokenize import Example
from prefloop.errors import UserError
from prefloop.models import heads
from prefloop.models.adapters import root_base
from prefloop.models.export import export_model, source_dtype
from prefloop.models.load import is_scorer_folder, load_policy, load_scorer
from prefloop.models.weights import Storage
from tests.models.plain import CPU, assert_close, plain_log_probs, random_examples, sequences
from tests.models.test_load import folder_of
from tests.tiny import ARCHS, tiny_model, tiny_tokenizer
from tests.training.small import write_rows

# PEFT itself, where a test calls it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def moved(model):
    """The model after a step that changed every trainable weight."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.trainable():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@torch.no_grad()
def log_probs(model):
    return heads.answer_log_probs(model, pack(random_examples()))


@torch.no_grad()
def scores(model):
    return heads.answer_scores(model, pack(random_examples()))


@torch.no_grad()
def right_padded_scores(module, pad):
    rows = [ids for ids, _ in sequences(random_examples())]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return module(input_ids=ids, attention_mask=mask).logits[:, 0]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_policy_folder_is_plain(tmp_path, arch):
    model = moved(load_policy(folder_of(tmp_path / "base", tiny_model(arch)), CPU))
    export_model(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert_close(log_probs(model), plain_log_probs(plain, random_examples()), 1e-5)
    weights = plain.state_dict()
    for name, weight in model.hf.state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert plain.config._attn_implementation == "sdpa"
    assert "prefloop" not in (tmp_path / "out" / "config.json").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    again = load_policy(str(tmp_path / "out"), CPU)
    assert torch.equal(log_probs(again), log_probs(model))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_stay_tied(tmp_path, tied):
    base = tiny_model("llama", tie_word_embeddings=tied)
    model = moved(load_policy(folder_of(tmp_path / "base", base), CPU))
    export_model(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    assert torch.equal(plain.lm_head.weight, model.hf.lm_head.weight)


def test_the_generation_config_is_kept(tmp_path):
    base = tiny_model("llama")
    base.generation_config = GenerationConfig(
        eos_token_id=[4, 2], pad_token_id=0, do_sample=True, temperature=0.6, top_p=0.9
    )
    export_model(load_policy(folder_of(tmp_path / "base", base), CPU), tmp_path / "out")
    kept = GenerationConfig.from_pretrained(tmp_path / "out")
    assert kept.eos_token_id == [4, 2]
    assert (kept.do_sample, kept.temperature, kept.top_p) == (True, 0.6, 0.9)


def base_with_pad(tmp_path, pad, arch="llama", rows=268):
    """A language model whose tokenizer pads with `pad`."""
    tokenizer = tiny_tokenizer()
    if pad != "<pad>":  # and nothing that looks like padding in the vocabulary
        core = json.loads(tokenizer.backend_tokenizer.to_str().replace("<pad>", "<old>"))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<|im_end|>"
        )
        tokenizer.pad_token = pad
    module = tiny_model(arch, vocab_size=rows, pad_token_id=None)
    return folder_of(tmp_path / "base", module, tokenizer)


PADS = {"own": ("<pad>", 268), "eos": ("<|im_end|>", 268), "none": (None, 268)}
PADS["none, spare rows"] = (None, 280)


@pytest.mark.parametrize(("pad", "rows"), PADS.values(), ids=PADS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_a_scorer_folder_is_plain(tmp_path, pad, rows, arch):
    model = moved(load_scorer(base_with_pad(tmp_path, pad, arch, rows), CPU))
    export_model(model, tmp_path / "out")
    assert is_scorer_folder(str(tmp_path / "out"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, None)
    assert tokenizer.pad_token_id < len(plain.get_input_embeddings().weight)
    ours = scores(model)
    assert_close(right_padded_scores(plain, tokenizer.pad_token_id), ours, 1e-5)
    assert_close(scores(load_scorer(str(tmp_path / "out"), CPU)), ours, 1e-6)


@torch.no_grad()
def test_the_last_token_is_scored_also_when_it_is_eos(tmp_path):
    """With pad = eos plain Transformers would score the token before it."""
    model = load_scorer(base_with_pad(tmp_path, "<|im_end|>"), CPU)
    export_model(model, tmp_path / "out")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = (10, 11, 12, 4)
    ours = heads.answer_scores(model, pack([Example(ids[:2], (ids[2:],), ((True, True),))]))
    assert_close(plain(input_ids=torch.tensor([ids])).logits[:, 0], ours, 1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_lora_exports_an_adapter(tmp_path, arch):
    base = tiny_model(arch)
    model = moved(load_policy(folder_of(tmp_path / "base", base), CPU, lora_rank=3))
    export_model(model, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        theirs = plain_log_probs(plain, random_examples())
        assert_close(log_probs(model), theirs, 1e-5)
        away = plain_log_probs(base, random_examples())
    assert float((theirs - away).abs().max()) > 0.1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 268


def test_an_adapters_base_is_found_from_anywhere(tmp_path, monkeypatch):
    folder_of(tmp_path / "base", tiny_model("llama"))
    monkeypatch.chdir(tmp_path)
    model = moved(load_policy("base", CPU, lora_rank=3))
    export_model(model, tmp_path / "out")
    monkeypatch.chdir(tmp_path.parent)
    assert_close(log_probs(load_policy(str(tmp_path / "out"), CPU)), log_probs(model), 1e-5)


def test_an_adapter_folder_is_merged_at_the_start(tmp_path):
    first = moved(load_policy(folder_of(tmp_path / "base", tiny_model("llama")), CPU, lora_rank=3))
    export_model(first, tmp_path / "first")
    model = load_policy(str(tmp_path / "first"), CPU)
    assert_close(log_probs(model), log_probs(first), 1e-5)
    assert len(model.trainable()) == len(list(tiny_model("llama").parameters()))
    second = moved(load_policy(str(tmp_path / "first"), CPU, lora_rank=3))
    expected = log_probs(second)
    for _ in range(2):  # exporting leaves the model as it is
        export_model(second, tmp_path / "second")
        assert_close(log_probs(second), expected, 1e-6)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval()
    with torch.no_grad():
        assert_close(plain_log_probs(plain, random_examples()), expected, 1e-5)


def test_merging_at_the_end_loses_nothing_to_how_the_base_is_kept(tmp_path):
    """A change far below bfloat16's step survives on a base that is kept in bfloat16."""
    base = folder_of(tmp_path / "base", tiny_model("llama"))
    export_model(load_policy(base, CPU, lora_rank=2), tmp_path / "first")  # which adds nothing
    storage = Storage("bfloat16", "bfloat16")
    whole = {"modules_to_save": ("norm",)}  # with which the first adapter is merged
    path = str(tmp_path / "first")
    second = load_policy(path, CPU, storage, trained=True, lora_rank=2, **whole)
    with torch.no_grad():
        for name, parameter in second.module.named_parameters():
            if "lora_B" in name:
                parameter += 1e-4
    export_model(second, tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    rates = dict(second.module.named_parameters())
    a, b = (rates[f"{stem}.lora_{x}.default.weight"] for x in "AB")
    whole = stored(tmp_path / "base")[name].bfloat16().float() + 2.0 * b @ a
    assert_close(stored(tmp_path / "out")[name], whole.detach(), 1e-7)


def test_a_run_directory_that_holds_an_adapter(tmp_path):
    """An adapter on an adapter is merged, also when it is named by its run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    first = moved(load_policy(folder_of(tmp_path / "base", tiny_model("llama")), CPU, lora_rank=3))
    export_model(first, run / "model")
    second = moved(load_policy(str(run), CPU, lora_rank=3))
    export_model(second, tmp_path / "out")
    assert_close(log_probs(load_policy(str(tmp_path / "out"), CPU)), log_probs(second), 1e-5)


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_scorer_with_adapters(tmp_path, pad):
    model = moved(load_scorer(base_with_pad(tmp_path, pad), CPU, lora_rank=3))
    export_model(model, tmp_path / "out")
    assert is_scorer_folder(str(tmp_path / "out"))
    expected = scores(model)
    again = load_scorer(str(tmp_path / "out"), CPU)
    assert_close(scores(again), expected, 1e-5)
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=1)
    plain.config.pad_token_id = again.tokenizer.pad_token_id
    plain.get_base_model().config.pad_token_id = again.tokenizer.pad_token_id
    padded = right_padded_scores(plain.eval(), again.tokenizer.pad_token_id)
    assert_close(padded, expected, 1e-5)
    export_model(again, tmp_path / "whole")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    assert_close(right_padded_scores(whole, again.tokenizer.pad_token_id), expected, 1e-5)


def test_a_critic_from_a_policys_adapter(tmp_path):
    policy = moved(load_policy(folder_of(tmp_path / "base", tiny_model("llama")), CPU, lora_rank=3))
    export_model(policy, tmp_path / "policy")
    assert not is_scorer_folder(str(tmp_path / "policy"))
    critic = load_scorer(str(tmp_path / "policy"), CPU, seed=1)
    batch = pack(random_examples())
    with torch.no_grad():
        ours = heads.hidden_states(critic, batch)
        assert_close(ours, heads.hidden_states(policy, batch), 1e-5)


HALF = torch.bfloat16


def stored(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_weights_keep_the_type_they_came_in(dtype, arch, tmp_path):
    """Norms too; the same names in a file of the same size, each number rounded once."""
    base = Path(folder_of(tmp_path / "base", tiny_model(arch, dtype=dtype)))
    model = moved(load_policy(str(base), CPU))
    assert model.hf.dtype == torch.float32
    export_model(model, tmp_path / "out")
    before, after, masters = stored(base), stored(tmp_path / "out"), model.hf.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype == dtype
        assert torch.equal(tensor, masters[name].to(dtype))
    sizes = [(p / "model.safetensors").stat().st_size for p in (base, tmp_path / "out")]
    assert sizes[0] == sizes[1]
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_a_scorer_and_a_merged_adapter_keep_it_too(tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("llama", dtype=HALF))
    export_model(load_scorer(base, CPU), tmp_path / "scorer")
    assert {t.dtype for t in stored(tmp_path / "scorer").values()} == {HALF}
    assert json.loads((tmp_path / "scorer" / "config.json").read_text())["dtype"] == "bfloat16"
    export_model(moved(load_policy(base, CPU, lora_rank=2)), tmp_path / "one")
    adapter = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert {t.dtype for t in adapter.values()} == {torch.float32}
    assert source_dtype(str(tmp_path / "one")) == HALF
    two = load_policy(str(tmp_path / "one"), CPU, lora_rank=2, modules_to_save=("norm",))
    export_model(two, tmp_path / "two")
    assert {t.dtype for t in stored(tmp_path / "two").values()} == {HALF}


def test_most_numbers_decide_and_other_types_become_float32(tmp_path):
    for name, kinds, right in (
        ("mixed", {"a": (9, HALF), "b": (4, torch.float32)}, HALF),
        ("double", {"a": (9, torch.float64), "b": (4, HALF)}, torch.float32),
    ):
        (tmp_path / name).mkdir()
        tensors = {key: torch.zeros(size, dtype=dtype) for key, (size, dtype) in kinds.items()}
        save_file(tensors, tmp_path / name / "model.safetensors")
        assert source_dtype(str(tmp_path / name)) == right


def test_a_step_of_training_keeps_type_names_and_size(tmp_path):
    base = Path(folder_of(tmp_path / "base", tiny_model("llama", dtype=HALF)))
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "the boat", "completion": " a"}])
    settings = {"lr": 0.05, "warmup": 0.0, "device": "cpu", "output": tmp_path / "run"}
    sft(SFTConfig(model=str(base), data=str(rows), **settings))
    before, after = stored(base), stored(tmp_path / "run" / "model")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {
        n: (t.dtype, t.shape) for n, t in after.items()
    }
    assert any(not torch.equal(t, before[n]) for n, t in after.items())


def stacked(tmp_path):
    """An adapter of PEFT's own on an adapter of ours."""
    base = folder_of(tmp_path / "base", tiny_model("llama", dtype=HALF))
    export_model(moved(load_policy(base, CPU, lora_rank=2)), tmp_path / "lower")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lower = PeftModel.from_pretrained(plain, tmp_path / "lower").merge_and_unload()
    lower.name_or_path = str(tmp_path / "lower")
    upper = get_peft_model(lower, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in upper.parameters():
            parameter += 0.1 * parameter.requires_grad
    upper.save_pretrained(tmp_path / "upper", save_embedding_layers=False)
    tiny_tokenizer().save_pretrained(tmp_path / "upper")
    return upper.eval()


def test_adapters_on_adapters_are_followed_to_their_root(tmp_path):
    upper = stacked(tmp_path)
    with torch.no_grad():
        right = plain_log_probs(upper, random_examples())
    assert_close(log_probs(load_policy(str(tmp_path / "upper"), CPU)), right, 1e-5)
    assert root_base(str(tmp_path / "upper")) == str(tmp_path / "base")
    said = tmp_path / "lower" / "adapter_config.json"
    changed = json.loads(said.read_text()) | {"base_model_name_or_path": str(tmp_path / "upper")}
    said.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="adapters name each other as their base"):
        load_policy(str(tmp_path / "upper"), CPU)


def test_exporting_again_replaces_the_folder(tmp_path):
    model = load_policy(folder_of(tmp_path / "base", tiny_model("llama")), CPU)
    export_model(model, tmp_path / "out")
    (tmp_path / "out" / "leftover.bin").write_text("old")
    before = log_probs(model)
    moved(model)
    export_model(model, tmp_path / "out")
    assert not (tmp_path / "out" / "leftover.bin").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert torch.equal(log_probs(load_policy(str(tmp_path / "out"), CPU)), log_probs(model))
    assert not torch.equal(before, log_probs(model))


def test_a_failing_export_leaves_what_was_there(tmp_path):
    model = load_policy(folder_of(tmp_path / "base", tiny_model("llama")), CPU)
    export_model(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    moved(model)
    model.tokenizer = None
    with pytest.raises(AttributeError):
        export_model(model, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
