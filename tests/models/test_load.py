"""Loading folders: what comes out of them, and what is refused with one line."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefloop.data.batches import pack
from prefloop.errors import UserError
from prefloop.models import heads
from prefloop.models.export import export_model
from prefloop.models.load import (
    disable_dropout,
    is_scorer_folder,
    load_policy,
    load_scorer,
    pick_device,
)
from tests.models.plain import (
    CPU,
    assert_close,
    assert_same_gradients,
    gradients,
    plain_log_probs,
    random_examples,
    tiny_scorer,
)
from tests.tiny import tiny_model, tiny_tokenizer


def folder_of(path, module, tokenizer=None):
    """A Hugging Face folder with the model and its tokenizer."""
    module.save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return str(path)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_policy_folder(tmp_path):
    plain = tiny_model("llama")
    model = load_policy(folder_of(tmp_path / "m", plain), CPU)
    examples = random_examples()
    assert model.packed and not model.is_scorer
    assert not model.module.training
    assert len(model.trainable()) == len(list(plain.parameters()))
    ours = heads.answer_log_probs(model, pack(examples))
    assert_close(ours, plain_log_probs(plain, examples), 1e-5)


def test_a_bfloat16_folder_gives_float32_masters(tmp_path):
    path = folder_of(tmp_path / "m", tiny_model("llama", dtype=torch.bfloat16))
    assert {p.dtype for p in load_policy(path, CPU).hf.parameters()} == {torch.float32}


DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off(tmp_path, checkpointing):
    """In evaluation mode it is anyway; gradient checkpointing needs training mode."""
    path = folder_of(tmp_path / "m", tiny_model("gpt2", **DROPOUT))
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    model = load_policy(path, CPU, gradient_checkpointing=checkpointing)
    examples = random_examples()
    for mode in (model.module.training, True):
        model.module.train(mode)
        ours = heads.answer_log_probs(model, pack(examples))
        theirs = plain_log_probs(plain, examples)
        assert_close(ours, theirs, 1e-5)
        assert_same_gradients(gradients(model.hf, ours), gradients(plain, theirs), 1e-5)


def test_every_way_of_writing_dropout_is_off():
    part = nn.Module()
    part.layerdrop, part.hidden_dropout, part.drop_path, part.width = 0.1, 0.2, 0.3, 0.4
    part.dense = nn.Sequential(nn.Dropout(0.5))
    disable_dropout(part)
    numbers = (part.layerdrop, part.hidden_dropout, part.drop_path, part.width, part.dense[0].p)
    assert numbers == (0.0, 0.0, 0.0, 0.4, 0.0)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_gradient_checkpointing_changes_nothing(tmp_path, arch):
    path = folder_of(tmp_path / "m", tiny_model(arch))
    batch = pack(random_examples())
    found = []
    for checkpointing in (False, True):
        model = load_policy(path, CPU, gradient_checkpointing=checkpointing)
        calls = []
        handle = model.base.get_submodule(
            "h.0.attn.c_attn" if arch == "gpt2" else "layers.0.self_attn.q_proj"
        )
        handle.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        numbers = heads.answer_log_probs(model, batch)
        found.append((numbers, gradients(model.hf, numbers), len(calls)))
    (direct, direct_gradients, once), (again, again_gradients, twice) = found
    assert (once, twice) == (1, 2)  # it did recompute
    assert torch.equal(direct, again)
    assert_same_gradients(again_gradients, direct_gradients, 1e-6)


def test_lora_trains_its_adapters_alone(tmp_path):
    path = folder_of(tmp_path / "m", tiny_model("llama"))
    for checkpointing in (False, True):
        model = load_policy(path, CPU, lora_rank=2, gradient_checkpointing=checkpointing)
        names = {n for n, p in model.module.named_parameters() if p.requires_grad}
        assert len(names) == 2 * 7 * 2  # A and B of seven linear maps in each of two layers
        assert all("lora" in name for name in names)
        heads.answer_log_probs(model, pack(random_examples())).sum().backward()
        assert all(p.grad is not None for p in model.trainable())


def test_lora_starts_from_the_models_numbers(tmp_path):
    plain = tiny_model("gpt2")
    model = load_policy(folder_of(tmp_path / "m", plain), CPU, lora_rank=2)
    examples = random_examples()
    ours = heads.answer_log_probs(model, pack(examples))
    assert_close(ours, plain_log_probs(plain, examples), 1e-5)


def test_a_new_head_follows_its_seed(tmp_path):
    path = folder_of(tmp_path / "m", tiny_model("llama", hidden=64))
    assert not is_scorer_folder(path)
    one, same, other = (load_scorer(path, CPU, seed=seed).hf.score.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (1, 64)
    assert abs(float(one.detach().std()) - 65**-0.5) < 0.3 * 65**-0.5


def test_a_scorer_folder_keeps_its_head(tmp_path):
    plain = tiny_scorer("llama")
    path = folder_of(tmp_path / "m", plain)
    assert is_scorer_folder(path)
    model = load_scorer(path, CPU, seed=3)
    assert model.is_scorer
    assert torch.equal(model.hf.score.weight, plain.score.weight)


def test_lora_trains_a_new_head_too(tmp_path):
    path = folder_of(tmp_path / "m", tiny_model("llama"))
    model = load_scorer(path, CPU, lora_rank=2)
    heads.answer_scores(model, pack(random_examples())).sum().backward()
    (head,) = [p for n, p in model.module.named_parameters() if "score" in n and p.requires_grad]
    assert head.shape == (1, 32) and head.grad is not None and head.grad.any()


# --- refused -------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer(tmp_path):
    path = tmp_path / "m"
    tiny_model("llama").save_pretrained(path)
    for load in (load_policy, load_scorer):
        with pytest.raises(UserError) as error:
            load(str(path), CPU)
        assert one_line(error).startswith(f"{path}: no tokenizer found")
        assert "tokenizer.save_pretrained" in one_line(error)


def test_a_folder_without_model(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    for load in (load_policy, load_scorer):
        with pytest.raises(UserError) as error:
            load(str(tmp_path), CPU)
        assert one_line(error).startswith(f"{tmp_path}: not a model folder or hub id")


def test_a_tokenizer_alone(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a model folder or hub id"):
        load_policy(str(tmp_path), CPU)


def test_a_path_that_is_not_there():
    for path in ("no/such/folder/anywhere", "./nowhere", "/nowhere/at/all"):
        with pytest.raises(UserError) as error:
            load_policy(path, CPU)
        assert one_line(error).startswith(f"{path}: not a model folder or hub id")


def test_a_hub_id_without_network_says_so_at_once():
    """The suite runs with HF_HUB_OFFLINE=1."""
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load_policy("someone/a-model", CPU)
    assert time.monotonic() - start < 10
    assert one_line(error).startswith("someone/a-model: no such folder here, and the hub")


def test_weights_that_are_missing(tmp_path):
    path = Path(folder_of(tmp_path / "m", tiny_model("llama")))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UserError) as error:
        load_policy(str(path), CPU)
    assert one_line(error).startswith(f"{path}: weights missing, such as model.layers.2.")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError) as error:
        load_policy(str(path), CPU)
    assert one_line(error).startswith(f"{path}: Transformers cannot load it as CausalLM")


def test_weights_of_other_shapes(tmp_path):
    path = Path(folder_of(tmp_path / "m", tiny_model("llama")))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(UserError) as error:
        load_policy(str(path), CPU)
    assert one_line(error).startswith(f"{path}: ")


def test_broken_weights(tmp_path):
    path = Path(folder_of(tmp_path / "m", tiny_model("llama")))
    data = (path / "model.safetensors").read_bytes()
    for broken in (b"\x00" * 100, data[:-1]):  # a shard that was copied in part
        (path / "model.safetensors").write_bytes(broken)
        with pytest.raises(UserError) as error:
            load_policy(str(path), CPU)
        start = f"{path}: Transformers cannot load it as CausalLM (model.safetensors: "
        assert one_line(error).startswith(start)


def test_broken_config(tmp_path):
    path = Path(folder_of(tmp_path / "m", tiny_model("llama")))
    for text in ("{", '{"model_type": "no-such-thing"}', "{}"):
        (path / "config.json").write_text(text)
        with pytest.raises(UserError) as error:
            load_policy(str(path), CPU)
        assert one_line(error).startswith(f"{path}: ")


def test_a_scorer_is_no_policy(tmp_path):
    """Its language-model head would be a new, random one."""
    path = folder_of(tmp_path / "m", tiny_scorer("llama"))
    with pytest.raises(UserError, match="a sequence classifier, not a language model"):
        load_policy(path, CPU)


def test_a_classifier_of_several_labels_is_no_scorer(tmp_path):
    config = tiny_model("llama").config
    config.num_labels = 3
    path = folder_of(tmp_path / "m", AutoModelForSequenceClassification.from_config(config))
    with pytest.raises(UserError) as error:
        load_scorer(path, CPU)
    assert one_line(error).startswith(f"{path}: ")


def test_a_scorer_without_its_head_is_refused(tmp_path):
    """Its scores would be those of a random head."""
    export_model(load_scorer(folder_of(tmp_path / "policy", tiny_model()), CPU), tmp_path / "rm")
    file = tmp_path / "rm" / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if name != "score.weight"}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights missing, such as score\.weight"):
        load_scorer(str(tmp_path / "rm"), CPU)


def test_loading_says_nothing(tmp_path, capfd):
    load_scorer(folder_of(tmp_path / "policy", tiny_model()), CPU)
    capfd.readouterr()
    load_scorer(str(tmp_path / "policy"), CPU)
    assert capfd.readouterr() == ("", "")


def test_a_device_that_is_not_here():
    with pytest.raises(UserError, match="--device mps: not a device here"):
        pick_device("mps")
