"""`prefloop export`: what is merged and cast is what it should be, and loads as it is elsewhere."""

import hashlib
import json
import shutil
from importlib.metadata import version

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from prefloop.commands import export
from prefloop.config import ExportConfig
from prefloop.errors import UserError
from prefloop.models.export import export_model, whole_folder
from prefloop.models.load import load_policy, load_scorer
from prefloop.models.model import SCORE_POSITION
from tests.models.plain import assert_close, plain_log_probs, random_examples
from tests.models.test_export import moved, right_padded_scores, stacked
from tests.models.test_load import folder_of
from tests.tiny import tiny_model, tiny_tokenizer
from tests.training.small import CPU, train, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
HALF = torch.bfloat16


def published(source, output, **settings):
    assert export(ExportConfig(run=str(source), output=output, **settings)) == output
    return output


def an_adapter(folder, arch="llama", dtype=torch.float32, **options):
    """A base with a generation config of its own, and a moved adapter on it."""
    base = tiny_model(arch, dtype=dtype)
    base.generation_config = GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=[4, 2])
    model = load_policy(folder_of(folder / "base", base), CPU, lora_rank=3, **options)
    export_model(moved(model), folder / "adapter")
    return folder / "adapter"


def card(folder):
    """Metadata and text."""
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("kept", [torch.float32, HALF])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
def test_a_merged_weight_is_w_plus_s_b_a_cast_once(asked, kept, arch, tmp_path):
    adapter = an_adapter(tmp_path, arch, kept)
    out = published(adapter, tmp_path / "out", merge=True, dtype=asked)
    right = kept if asked == "auto" else getattr(torch, asked)
    base = load_file(tmp_path / "base" / "model.safetensors")
    own = load_file(adapter / "adapter_model.safetensors")
    found = load_file(out / "model.safetensors")
    assert found.keys() == base.keys()
    merged = 0
    for name, weight in base.items():
        stem = "base_model.model." + ("" if arch == "llama" else "transformer.")
        stem += name.removesuffix(".weight").removeprefix("transformer.")
        whole = weight.float()
        if f"{stem}.lora_A.weight" in own:
            change = 2.0 * own[f"{stem}.lora_B.weight"] @ own[f"{stem}.lora_A.weight"]
            whole, merged = whole + (change.T if arch == "gpt2" else change), merged + 1
        assert found[name].dtype == right
        exact = right == torch.float32
        bounds = {"rtol": 1e-6, "atol": 1e-6} if exact else {"rtol": 2**-7, "atol": 1e-6}
        torch.testing.assert_close(found[name].float(), whole, **bounds)
        rounded = (found[name] != whole.to(right)).float().mean()  # a sum's last bit may tip a half
        assert exact or rounded < 0.01
    assert merged == (14 if arch == "llama" else 8)
    said = json.loads((out / "config.json").read_text())
    assert said["dtype"] == str(right).removeprefix("torch.")


def test_a_merged_folder_is_plain_and_complete(tmp_path):
    adapter = an_adapter(tmp_path, modules_to_save=("embed_tokens",), lora_dropout=0.2)
    out = published(adapter, tmp_path / "deep" / "out", merge=True)
    theirs = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        right = plain_log_probs(theirs, random_examples())
        assert_close(plain_log_probs(plain, random_examples()), right, 1e-5)
    assert AutoTokenizer.from_pretrained(out).chat_template == tiny_tokenizer().chat_template
    kept = GenerationConfig.from_pretrained(out)
    assert (kept.do_sample, kept.temperature, kept.eos_token_id) == (True, 0.6, [4, 2])
    assert not (out / "adapter_config.json").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_adapters_on_an_adapter_are_merged_onto_their_root(tmp_path):
    """In the type of the root base, which came in bfloat16."""
    upper = stacked(tmp_path)
    out = published(tmp_path / "upper", tmp_path / "out", merge=True, dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        right = plain_log_probs(upper, random_examples())
        assert_close(plain_log_probs(plain, random_examples()), right, 1e-5)
    auto = published(tmp_path / "upper", tmp_path / "auto", merge=True)
    assert {t.dtype for t in load_file(auto / "model.safetensors").values()} == {HALF}


def test_a_reward_model_keeps_how_it_is_read(tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("llama", pad_token_id=None))
    model = moved(load_scorer(base, CPU, lora_rank=3))
    model.hf.config.reward_mean, model.hf.config.reward_std = 0.25, 2.0
    export_model(model, tmp_path / "rm")
    out = published(tmp_path / "rm", tmp_path / "out", merge=True)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1)
    pad = model.tokenizer.pad_token_id
    theirs.get_base_model().config.pad_token_id = pad
    plain = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert_close(right_padded_scores(plain, pad), right_padded_scores(theirs.eval(), pad), 1e-5)
    said = plain.config
    assert (said.reward_mean, said.reward_std, said.pad_token_id) == (0.25, 2.0, pad)
    assert getattr(said, SCORE_POSITION) == "rendered"
    about, text = card(out)
    assert "pipeline_tag" not in about
    assert "The score is the logit at the last token of the whole rendered chat" in text


def test_whole_weights_are_cast_and_an_adapter_stays_as_it_is(tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("llama"))
    out = published(base, tmp_path / "half", dtype="bfloat16")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(after[name], tensor.to(HALF)) for name, tensor in before.items())
    adapter = an_adapter(tmp_path / "more")
    again = published(adapter, tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (adapter / name).read_bytes()
    _, text = card(again)
    assert 'AutoPeftModelForCausalLM.from_pretrained("again")' in text


# --- refused before the work ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "settings", "line"),
    [
        ("base", {"merge": True}, "--merge: .*base holds whole weights, and no adapter; leave"),
        ("adapter", {"dtype": "bfloat16"}, "--dtype bfloat16: .* is an adapter, .* give --merge"),
        ("adapter", {"output": "base"}, "--output .*base exists; choose another"),
        ("./nothing", {}, "./nothing: not a model folder or hub id"),
        ("run", {}, "run: the run is interrupted, not finished; give its command again first"),
        ("adapter", {"output": "base/model.safetensors/x"}, "is no folder one can write to"),
    ],
)
def test_what_cannot_be_is_told(source, settings, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    an_adapter(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "interrupted", "command": "sft"}')
    before = sorted(tmp_path.rglob("*"))
    chosen = {"output": tmp_path / "out"} | settings
    chosen["output"] = tmp_path / chosen["output"]
    with pytest.raises(UserError, match=line) as caught:
        export(ExportConfig(run=source, **chosen))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "give --output, --push-to-hub, or both"),
        ({"push_to_hub": "name"}, "--push-to-hub is 'name'; give OWNER/NAME"),
        ({"output": "x", "private": True}, "--private is read only with --push-to-hub"),
    ],
)
def test_settings_that_cannot_be(settings, line):
    with pytest.raises(UserError, match=line):
        export(ExportConfig(run="x", **settings))


def half_written(folder):
    with whole_folder(folder) as place:
        (place / "part").write_text("x")
        raise ZeroDivisionError


def test_a_folder_is_whole_or_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError):
        half_written(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_fails_leaves_nothing(tmp_path):
    adapter = an_adapter(tmp_path)
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load"):
        export(ExportConfig(run=str(adapter), output=tmp_path / "out", merge=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# --- the card -------------------------------------------------------------------------------------


def test_the_card_tells_how_the_model_was_made(tmp_path, monkeypatch):
    """Two runs on a base whose card says its licence; nothing tells where folders lie."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "base", tiny_model("llama"))
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\nMine.\n")
    rows = [
        {"prompt": "the boat", "completion": " a"},
        {"prompt": "oath", "completion": " in" * 99},
    ]
    write_rows(tmp_path / "demos.jsonl", rows)
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "ant", "chosen": " a", "rejected": " in"}])
    data = str(tmp_path / "demos.jsonl")
    more = {"model": str(tmp_path / "base"), "truncation": "drop", "max_length": 40}
    train("sft", tmp_path, tmp_path / "first", data=data, **more)
    more = {"model": "first", "data": "pairs.jsonl", "beta": 0.3, "lora_rank": 2}
    run = train("dpo", tmp_path, tmp_path / "second", **more)
    shutil.move("demos.jsonl", "moved.jsonl")
    about, text = card(published(run.directory, tmp_path / "out", merge=True))
    tags = ["prefloop", "dpo"]
    assert about == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": tags,
    }
    assert str(tmp_path) not in text
    assert "A language model, trained with `prefloop dpo`, from `base`." in text
    command = text.split("```sh\n")[1].split("\n```")[0].split()
    assert command[:6] == "prefloop dpo --model first --data pairs.jsonl".split()
    assert " ".join(command[6:]) == (
        "--lr 0.001 --warmup 0.0 --dtype float32 --lora-rank 2 --max-length 128 --beta 0.3"
    )
    assert "All other settings are the defaults." in text
    digest = hashlib.sha256((tmp_path / "pairs.jsonl").read_bytes()).hexdigest()
    assert f"| `pairs.jsonl` | 1 | 1 | 0 | `{digest}` |" in text
    assert "After 1 steps, " in text
    assert "| `loss` | 0.6931 |" in text  # log 2: the first step of DPO
    assert f"torch {version('torch')}" in text
    about, text = card(published("first", tmp_path / "early"))
    assert (
        "| `demos.jsonl` | 2 | 1 | 1 (longer than 40 tokens) |  |" in text
    )  # no longer there to be hashed


def test_a_folder_that_no_run_made_keeps_its_own_card(tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("llama"))
    (tmp_path / "base" / "README.md").write_text("Mine.")
    assert (published(base, tmp_path / "out") / "README.md").read_text() == "Mine."
