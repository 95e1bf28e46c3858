"""How weights are kept: in which types, at what cost in memory, and with the same numbers."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prefloop.data.batches import pack
from prefloop.errors import UserError
from prefloop.models import heads, weights
from prefloop.models.load import load_policy, load_scorer
from prefloop.models.weights import Storage
from tests.models.plain import plain_log_probs, random_examples
from tests.tiny import ARCHS, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


def folder(tmp_path, arch, dtype=torch.bfloat16, **shape):
    """A model of that type on disk."""
    tiny_model(arch, **shape).to(dtype).save_pretrained(tmp_path / arch)
    tiny_tokenizer().save_pretrained(tmp_path / arch)
    return str(tmp_path / arch)


def log_probs(model, batch):
    with torch.no_grad():
        return heads.answer_log_probs(model, batch)


@pytest.mark.parametrize("arch", ARCHS)
def test_frozen_bfloat16_gives_the_bits_of_float32_masters(arch, tmp_path):
    """Autocast rounds a weight before each product anyway."""
    path = folder(tmp_path, arch)
    kept = load_policy(path, CPU, Storage("bfloat16"))
    masters = load_policy(path, CPU, Storage("bfloat16"), trained=True)
    assert {p.dtype for p in masters.module.parameters()} == {torch.float32}
    sizes = [sum(p.nbytes for p in m.module.parameters()) for m in (kept, masters)]
    assert sizes[0] < 0.51 * sizes[1]
    assert kept.packed
    batch = pack(random_examples())
    ours, theirs = log_probs(kept, batch), log_probs(masters, batch)
    if arch == "gemma3":  # it scales its embeddings in their own type
        assert (ours - theirs).abs().max() < 0.1
    else:
        assert torch.equal(ours, theirs)


def test_what_is_not_multiplied_keeps_its_digits(tmp_path):
    """Norms, and embeddings that come in float32, untied here; --weights bfloat16 has them, too."""
    path = folder(tmp_path, "llama", torch.float32, tie_word_embeddings=False)
    auto = load_policy(path, CPU, Storage("bfloat16")).hf
    assert auto.model.embed_tokens.weight.dtype == torch.float32
    assert auto.lm_head.weight.dtype == torch.bfloat16
    assert auto.model.norm.weight.dtype == torch.float32
    short = load_policy(path, CPU, Storage("bfloat16", "bfloat16"), trained=True).hf
    assert short.model.embed_tokens.weight.dtype == torch.bfloat16
    assert short.model.norm.weight.dtype == torch.float32
    scorer = load_scorer(path, CPU, Storage("bfloat16")).hf
    assert scorer.score.weight.dtype == torch.float32


def test_lora_freezes_a_short_base_and_trains_long_adapters(tmp_path):
    path = folder(tmp_path, "llama")
    model = load_policy(path, CPU, Storage("bfloat16"), trained=True, lora_rank=2)
    assert {p.dtype for p in model.trainable()} == {torch.float32}
    linear = [m.base_layer for m in model.hf.modules() if hasattr(m, "base_layer")]
    assert {m.weight.dtype for m in linear} == {torch.bfloat16}


def test_storage_that_cannot_be():
    with pytest.raises(UserError, match=r"--weights bfloat16 .* give --dtype bfloat16"):
        weights.kept(Storage("float32", "bfloat16"), CPU, trained=True)
    with pytest.raises(UserError, match="--weights nf4 cannot be trained itself; give --lora-rank"):
        weights.kept(Storage("float32", "nf4"), CPU, trained=True)


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_nf4_is_that_of_transformers(arch, tmp_path):
    """Log-probs of plain Transformers on the same quantised model, to 1e-5 in float32."""
    pytest.importorskip("bitsandbytes")
    path = folder(tmp_path, arch, hidden=64)
    model = load_policy(path, CPU, Storage("float32", "nf4"))
    assert model.packed
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=how, dtype=torch.float32
    ).train()  # without gradients, in evaluation, bitsandbytes takes kernels of less precision
    examples = random_examples()
    expected = plain_log_probs(plain, examples).detach()
    ours = log_probs(model, pack(examples))
    assert (ours - expected).abs().max() < 1e-5
    exact = log_probs(load_policy(path, CPU), pack(examples))
    assert 1e-4 < (ours - exact).abs().mean() < 1.0


def test_nf4_is_a_seventh_of_float32(tmp_path):
    """Half a byte a weight, a scale's byte for 64 of them, and four for 256 scales."""
    pytest.importorskip("bitsandbytes")
    path = folder(tmp_path, "llama", hidden=64)
    model = load_policy(path, CPU, Storage("float32", "nf4"))
    layers = [m for m in model.hf.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) == 2 * 7  # no head among them
    for layer in layers:
        assert layer.weight.nbytes == layer.in_features * layer.out_features // 2
        assert layer.weight.quant_state.absmax.dtype == torch.uint8


def test_nf4_gradients_reach_the_adapters(tmp_path):
    """Those of a float32 model whose weights are the quantised ones'."""
    bnb = pytest.importorskip("bitsandbytes")
    path = folder(tmp_path, "llama", hidden=64)
    options = {"trained": True, "lora_rank": 2}
    torch.manual_seed(0)
    short = load_policy(path, CPU, Storage("float32", "nf4"), **options)
    torch.manual_seed(0)
    long = load_policy(path, CPU, **options)
    pairs = list(zip(short.hf.modules(), long.hf.modules(), strict=True))
    for quantised, plain in pairs:
        if isinstance(quantised, bnb.nn.Linear4bit):
            state = quantised.weight.quant_state
            plain.weight.data = bnb.functional.dequantize_4bit(quantised.weight.data, state)
    found = []
    for model in (short, long):
        heads.answer_log_probs(model, pack(random_examples())).sum().backward()
        found.append([p.grad for p in model.trainable()])
    assert len(found[0]) == 2 * 14
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


SCRIPT = """
import sys, threading, time, torch
from prefloop.models import load, weights
from transformers import AutoModelForCausalLM
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
peak, over = [0], threading.Event()
def watch():
    while not over.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)
plan = weights.kept(weights.Storage(*sys.argv[2:4]), torch.device("cpu"), True)
before, thread = resident(), threading.Thread(target=watch)
thread.start()
model = load._from_pretrained(AutoModelForCausalLM, sys.argv[1], plan)
weights.settle(model, torch.device("cpu"), plan)
for parameter in model.parameters(): parameter.sum()  # all of it is there
over.set(); thread.join()
size = sum(p.nbytes for p in model.parameters())
print((max(peak[0], resident()) - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_loading_takes_little_more_than_what_is_kept(stored, kept, tmp_path):
    """At most 1.15 of its bytes, whatever type the folder has: 200 or 400 MB here."""
    path = folder(tmp_path, "llama", stored, hidden=1024, layers=10)
    words = [sys.executable, "-c", SCRIPT, path, "bfloat16", kept]
    found = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    assert float(found) < 1.15


def test_the_type_of_products_is_the_devices(tmp_path):
    model = load_policy(folder(tmp_path, "llama"), CPU, Storage("auto"))
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert model.dtype == ("bfloat16" if native else "float32")


def test_the_self_test_is_as_exact_with_short_weights(tmp_path):
    """A model in bfloat16 is packed, and its frozen twin in float32 told by the same numbers."""
    model = load_policy(folder(tmp_path, "mistral"), CPU, Storage("bfloat16"))
    assert model.packed
    batch = pack(random_examples())
    with weights.exact_products(model.hf):
        wide = log_probs(replace(model, dtype="float32"), batch)
    exact = log_probs(load_policy(model.source, CPU), batch)
    assert (wide - exact).abs().max() < 1e-5
    assert isinstance(model.hf.lm_head, nn.Linear)
