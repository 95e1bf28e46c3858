"""GGUF files: every field and tensor is what llama.cpp's layout says, and the rest is refused.

That llama.cpp then computes the same is shown in test_llama_cpp.py.
"""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from prefloop.commands import export
from prefloop.config import ExportConfig
from prefloop.errors import UserError
from prefloop.models import gguf as writer
from prefloop.models.export import export_model
from prefloop.models.gguf_tokenizer import adds_bos, cautions, pre_tokenizer_name, tokenizer_fields
from prefloop.models.load import load_policy, load_scorer
from tests.models.test_export import moved
from tests.models.test_load import folder_of
from tests.tiny import CHATML, LLAMA2, SPECIALS, tiny_model, tiny_tokenizer
from tests.training.small import CPU

gguf = pytest.importorskip("gguf")
HALF = torch.bfloat16
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def written(folder, model, tokenizer=None, generation=None):
    """A file made of a model's folder."""
    model.save_pretrained(folder / "plain")
    (tokenizer or tiny_tokenizer()).save_pretrained(folder / "plain")
    if generation is not None:
        generation.save_pretrained(folder / "plain")
    writer.write_gguf(folder / "plain", folder / "model.gguf")
    return folder / "model.gguf"


def read(file):
    """Fields but those that say how the file is built, and tensors, each after its type."""
    opened = gguf.GGUFReader(file)
    fields = {n: f.contents() for n, f in opened.fields.items() if not n.startswith("GGUF.")}
    return fields, {t.name: (t.tensor_type.name, torch.tensor(t.data)) for t in opened.tensors}


# --- what is in the file --------------------------------------------------------------------------


def test_every_field(tmp_path):
    """Of the tiny Llama: width 32, 4 heads of 8, 2 of keys, 2 layers, ChatML, 4 rows too many."""
    ends = GenerationConfig(eos_token_id=[4, 2])
    rows = 272
    model = tiny_model("llama", vocab_size=rows, rms_norm_eps=1e-5)
    fields, _ = read(written(tmp_path, model, generation=ends))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġt", "th", "the", "Ġa", "in", "ab", "oo"]
    assert fields.pop("tokenizer.ggml.tokens") == (
        [*SPECIALS, *letters, *words, "[PAD268]", "[PAD269]", "[PAD270]", "[PAD271]"]
    )
    types = 5 * [3] + 263 * [1] + 4 * [5]  # control, normal, unused
    assert fields.pop("tokenizer.ggml.token_type") == types
    epsilon = fields.pop("llama.attention.layer_norm_rms_epsilon")
    assert epsilon == pytest.approx(1e-5, rel=1e-6)
    assert fields == {
        "general.architecture": "llama",
        "general.file_type": 0,
        "llama.vocab_size": rows,
        "llama.context_length": 512,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["Ġ t", "t h", "th e", "Ġ a", "i n", "a b", "o o"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHATML,
    }


OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TURNED = [0, 4, 1, 5, 2, 6, 3, 7]  # rows of a head of width 8: halves become neighbours


@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float16])
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen3", {}),
    ],
)
def test_every_tensor(arch, options, dtype, tmp_path):
    model = tiny_model(arch, dtype=dtype, **options)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:  # else all biases are 0, all norms 1
            weight.data = torch.arange(len(weight)).to(dtype) / 16 + len(name)
    file = written(tmp_path, model)
    fields, tensors = read(file)
    assert fields["general.file_type"] == {torch.float32: 0, torch.float16: 1, HALF: 32}[dtype]
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    assert len(tensors) == len(weights)
    for name, (kind, found) in tensors.items():
        if name in OUTSIDE:
            right = weights[OUTSIDE[name]]
        else:
            _, layer, part, end = name.split(".")
            right = weights[f"model.layers.{layer}.{INSIDE[part]}.{end}"]
            if arch == "llama" and part in ("attn_q", "attn_k"):
                heads = right.split(8)
                right = torch.cat([head[TURNED] for head in heads])
        if right.ndim == 1:
            assert kind == "F32"
            assert torch.equal(found, right.float())
        else:
            assert kind == {torch.float32: "F32", torch.float16: "F16", HALF: "BF16"}[dtype]
            bits = found.view(torch.uint8).flatten()
            assert torch.equal(bits, right.contiguous().view(torch.uint8).flatten())


def test_rows_of_a_head_become_neighbours():
    """Two heads of width 4, by hand."""
    found = writer.interleaved(torch.arange(8.0), 2)
    assert found.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    table = torch.arange(8.0).repeat_interleave(3).reshape(8, 3)
    assert writer.interleaved(table, 2)[:, 1].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_positions_of_llama_3(tmp_path):
    """Factors are plain frequencies over Transformers' own scaled ones."""
    model = tiny_model("llama", rope_parameters=LLAMA3, head_dim=16)
    fields, tensors = read(written(tmp_path, model))
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, CPU)
    plain = 500.0 ** (-torch.arange(0, 16, 2) / 16)
    kind, found = tensors["rope_freqs.weight"]
    assert kind == "F32"
    torch.testing.assert_close(found, plain / scaled, rtol=1e-5, atol=0)
    assert found[0] == 1 and found[-1] == 8 and 1 < found[2] < 8
    assert fields["llama.rope.freq_base"] == 500.0
    assert "llama.rope.scaling.type" not in fields


def test_linear_positions(tmp_path):
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
    fields, _ = read(written(tmp_path, tiny_model("qwen3", rope_parameters=rope)))
    assert fields["qwen3.rope.scaling.type"] == "linear"
    assert fields["qwen3.rope.scaling.factor"] == 3.0


# --- tokenizers -----------------------------------------------------------------------------------

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitter(pattern, *before):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([*before, split, BYTES])


@pytest.mark.parametrize(
    ("found", "ignores", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (splitter(GPT2), False, "gpt-2"),  # the same, said otherwise
        (splitter(GPT2, pre_tokenizers.Digits(individual_digits=True)), False, "smollm"),
        (splitter(QWEN2), False, "qwen2"),
        (splitter(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), True, "llama-bpe"),
        (splitter(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), False, "dbrx"),
    ],
)
def test_a_pre_tokenizer_is_known_by_what_it_does(found, ignores, name):
    assert pre_tokenizer_name(found, ignores) == name


@pytest.mark.parametrize(
    ("found", "ignores"),
    [
        (None, False),
        (BYTES, False),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), False),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), True),
        (splitter(QWEN2), True),
        (splitter(QWEN2.replace("'re|", "")), False),
        (splitter(QWEN2.replace(r"\p{N}|", r"\p{N}{1,4}|")), False),
        (splitter(QWEN2.replace(r"[\r\n]*|", "|")), False),
        (splitter(GPT2.replace(r"'t|", "")), False),
    ],
)
def test_a_pre_tokenizer_that_is_not_known_is_refused(found, ignores):
    with pytest.raises(UserError, match=r"--gguf: its tokenizer splits texts in a way .*; leave"):
        pre_tokenizer_name(found, ignores)


@pytest.mark.parametrize(
    ("tokenizer", "adds", "lines"),
    [
        (tiny_tokenizer(), False, []),
        (tiny_tokenizer(chat=False, bos=True), True, []),
        (tiny_tokenizer(bos=True, template=LLAMA2), True, []),
        (tiny_tokenizer(bos=True), False, ["the chat template prints no <bos>, .* before none"]),
    ],
)
def test_bos_is_put_where_the_tokenizer_and_the_template_put_it(tokenizer, adds, lines):
    assert adds_bos(tokenizer) == adds
    found = list(cautions(tokenizer))
    assert len(found) == len(lines)
    for line, said in zip(lines, found, strict=True):
        assert re.search(line, said)


def changed(place, change):
    """The tiny tokenizer, its JSON changed."""
    tiny_tokenizer().save_pretrained(place)
    core = json.loads((place / "tokenizer.json").read_text())
    change(core)
    (place / "tokenizer.json").write_text(json.dumps(core))
    return AutoTokenizer.from_pretrained(place)


def test_tokens_that_are_added_but_not_special_are_the_users(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"])
    fields = tokenizer_fields(tokenizer, 269, {4})
    assert fields["tokenizer.ggml.tokens"][268] == "<think>"
    assert fields["tokenizer.ggml.token_type"][267:] == [1, 4]


def test_nfc_is_told(tmp_path):
    tokenizer = changed(tmp_path, lambda core: core.update(normalizer={"type": "NFC"}))
    assert tokenizer_fields(tokenizer, 268, {4})["tokenizer.ggml.pre"] == "gpt-2"
    assert list(cautions(tokenizer)) == [
        "the tokenizer brings texts into NFC, which llama.cpp does not: give it NFC"
    ]


def without_byte(core):
    core["model"]["unk_token"] = "<eos>"
    vocab = core["model"]["vocab"]
    vocab["<other>"] = vocab.pop("z")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda c: c.update(normalizer={"type": "Lowercase"}), "changes texts before it splits"),
        (lambda c: c["added_tokens"][3].update(rstrip=True), r"<\|im_start\|> has the option rst"),
        (lambda c: c["model"].update(merges=[]), "has no merges"),
        (lambda c: c["model"].update(byte_fallback=True), "not a byte-level BPE"),
        (lambda c: c["model"].update(dropout=0.1), "has the option dropout"),
        (without_byte, "lacks 1 bytes, read as <eos>"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not_is_refused(change, line, tmp_path):
    with pytest.raises(UserError, match=f"--gguf: its .*{line}.*; leave --gguf out"):
        tokenizer_fields(changed(tmp_path, change), 268, {4})


def test_what_a_file_cannot_name_is_refused():
    for rows, stops, line in (
        (267, {4}, "has the token oo, the model no row for it"),
        (268, {4, 2, 5, 6}, "4 tokens end its answers, and a file names three at most"),
    ):
        with pytest.raises(UserError, match=line):
            tokenizer_fields(tiny_tokenizer(), rows, stops)
    nameless = tiny_tokenizer()
    nameless.eos_token = None
    with pytest.raises(UserError, match="names no token that ends an answer"):
        tokenizer_fields(nameless, 268, {4})
    assert normalizers.NFC().normalize_str("e\u0301") == "é"  # what it is that llama.cpp leaves


# --- models that are refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "options", "line"),
    [
        ("gpt2", {}, "models of the type gpt2 are not written, only llama, mistral, qwen2, qwen3"),
        ("gemma3", {}, "models of the type gemma3_text are not written"),
        ("mistral", {}, "attends within a window of 6 tokens"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, not silu"),
        ("qwen3", {"attention_bias": True}, "its attention has biases"),
        ("qwen3", {"rope_parameters": LLAMA3}, "of the kind llama3"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}},
            "its rotary positions are of the kind dynamic",
        ),
    ],
)
def test_a_model_that_llama_cpp_computes_otherwise_is_refused(arch, options, line, tmp_path):
    tiny_model(arch, **options).config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"--gguf: .*{line}.*; leave --gguf out") as caught:
        writer.require_convertible(str(tmp_path), tiny_tokenizer())
    assert "\n" not in str(caught.value)


def test_quantised_weights_are_refused(tmp_path):
    config = tiny_model("llama").config
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its weights are quantised"):
        writer.require_convertible(str(tmp_path), tiny_tokenizer())


# --- the command ----------------------------------------------------------------------------------


def an_adapter(place, arch="llama", dtype=HALF):
    base = folder_of(place / "base", tiny_model(arch, dtype=dtype))
    export_model(moved(load_policy(base, CPU, lora_rank=3)), place / "adapter")
    return str(place / "adapter")


@pytest.mark.parametrize(("asked", "kind"), [("auto", "BF16"), ("float32", "F32")])
def test_a_merged_adapter_has_the_weights_of_its_folder(asked, kind, tmp_path):
    adapter = an_adapter(tmp_path)
    for form in ("plain", "file"):
        settings = {"merge": True, "dtype": asked, "gguf": form == "file"}
        export(ExportConfig(run=adapter, output=tmp_path / form, **settings))
    name = f"file-{kind}.gguf"
    assert sorted(p.name for p in (tmp_path / "file").iterdir()) == ["README.md", name]
    writer.write_gguf(tmp_path / "plain", tmp_path / "again.gguf")
    assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "again.gguf").read_bytes()
    base = load_file(tmp_path / "base" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    kind_found, merged = read(tmp_path / "file" / name)[1]["blk.0.ffn_up.weight"]
    assert kind_found == kind
    values = merged.view(HALF).float() if kind == "BF16" else merged
    assert values.shape == base.shape and not torch.equal(values, base.float())
    _, head, text = (tmp_path / "file" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["prefloop", "gguf", "llama.cpp"]
    assert "library_name" not in yaml.safe_load(head)
    assert f"```sh\nllama-server --model {name}\n```" in text
    assert "from_pretrained" not in text


def test_whole_weights_become_a_file(tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("llama", dtype=torch.float16))
    export(ExportConfig(run=base, output=tmp_path / "out", gguf=True))
    _, tensors = read(tmp_path / "out" / "out-F16.gguf")
    assert tensors["output.weight"][0] == "F16"


@pytest.mark.parametrize(
    ("source", "settings", "line"),
    [
        ("adapter", {}, "--gguf: .*adapter is an adapter; give --merge"),
        ("gpt2/adapter", {"merge": True}, "--gguf: models of the type gpt2 are not written"),
        ("rm", {}, "--gguf: .*rm is a reward model, which llama.cpp does not read"),
    ],
)
def test_what_cannot_be_a_file_is_refused_before_the_work(source, settings, line, tmp_path):
    an_adapter(tmp_path)
    an_adapter(tmp_path / "gpt2", "gpt2")
    export_model(load_scorer(str(tmp_path / "base"), CPU), tmp_path / "rm")
    for weights in tmp_path.rglob("*.safetensors"):
        weights.write_bytes(b"")  # nobody gets so far as to read them
    config = ExportConfig(
        run=str(tmp_path / source), output=tmp_path / "out", gguf=True, **settings
    )
    with pytest.raises(UserError, match=line):
        export(config)
    assert not (tmp_path / "out").exists()
