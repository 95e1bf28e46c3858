"""llama.cpp reads our files: the same tokens of texts, log-probs, greedy answers, and prompts."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from prefloop.commands import export
from prefloop.config import ExportConfig
from prefloop.models.export import export_model
from prefloop.models.gguf import write_gguf
from prefloop.models.load import load_policy, load_tokenizer
from prefloop.recipes import fetch
from tests.llama import Llama
from tests.models.test_export import moved
from tests.models.test_load import folder_of
from tests.tiny import LLAMA2, tiny_model, tiny_tokenizer
from tests.training.small import CPU

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from tests.models.test_gguf import GPT2, LLAMA3, QWEN2, splitter, written

LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
ODD = [
    "",
    " ",
    "   ",
    "a  b   c\t\td\n\n\ne \r\n f\n ",
    "안녕하세요, 반갑습니다! 12,345원입니다.",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 ok",
    "1234567890 3.14159 ½ ² ٣ 2026-11-27",
    "def f(x):\n    return x**2  # 제곱\n\tpass",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>",
    "<|im_start <|im_end|",
    "don't DON'T we'll I'M 's' they'VE 'd",
    "e\u0301 é ｆｕｌｌ　ｗｉｄｔｈ",
    "\u200b\ufeff\u00a0x\u3000y",
    "Ünïcödé ñandú Ж ش ไทย हिन्दी 中文",
    "!!!???...---<=>+$",
    "http://x.y/z?a=b&c=d",
]


def qwen2(**options):
    sizes = {"vocab_size": 280, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Qwen2Config(**sizes, **heads, **options, initializer_range=0.2)
        return AutoModelForCausalLM.from_config(config).eval()


def uneven(model):
    """With norms that are not 1 and biases that are not 0."""
    draw = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.data += 0.3 * torch.randn(weight.shape, generator=draw)
    return model


def greedy(model, ids, count, ends=frozenset({2, 4, 268})):
    """Transformers' answer; it ends, as there, with <eos>, <|im_end|> or Qwen2's <|endoftext|>."""
    with torch.no_grad():
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=sorted(ends)
        )
    return whole[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model("llama"),
        lambda: tiny_model("llama", tie_word_embeddings=True, head_dim=16),
        lambda: tiny_model("llama", attention_bias=True, mlp_bias=True),
        lambda: tiny_model("llama", rope_parameters=LINEAR),
        lambda: tiny_model("llama", rope_parameters=LLAMA3),
        lambda: tiny_model("mistral", sliding_window=None),
        lambda: tiny_model("qwen3"),
        lambda: tiny_model("qwen3", tie_word_embeddings=True, rope_parameters=LINEAR),
        qwen2,
        lambda: qwen2(tie_word_embeddings=True, rope_parameters=LINEAR),
    ],
)
def test_greedy_answers_and_log_probs_are_the_same(make, tmp_path):
    """To 1e-5 nats, on prompts of up to 120 tokens, where Llama 3.1's factors count."""
    model = uneven(make())
    llama = Llama(written(tmp_path, model))
    tokenizer, compared = tiny_tokenizer(), 0
    for text in ("the boat in the oath and ", "한국 12 3 ", "xyz " * 30):
        ids = tokenizer(text).input_ids
        answer = greedy(model, ids, 30)
        assert llama.greedy(ids, 30) == answer
        with torch.no_grad():
            rows = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
        for end in range(len(ids), len(ids + answer), 6):
            found = llama.log_probs((ids + answer)[:end], 40)
            for token, value in found.items():
                assert value == pytest.approx(rows[end - 1, token].item(), abs=1e-5)
            compared += len(found)
    assert compared > 200


def with_splitter(found, ignores):
    """A tokenizer with merges over all boundaries, whose splitter alone keeps them apart."""
    draw = random.Random(1)
    texts = ["".join(draw.choices(sorted(set("".join(ODD))), k=200)) for _ in range(20)]
    core = Tokenizer(models.BPE(ignore_merges=ignores))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<eos>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=6,
    )
    core.train_from_iterator([*ODD * 3, *texts], trainer)
    core.pre_tokenizer = found
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.mark.parametrize(
    ("found", "ignores"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
        (splitter(GPT2, pre_tokenizers.Digits(individual_digits=True)), False),
        (splitter(QWEN2), False),
        (splitter(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), True),
        (splitter(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), False),
    ],
)
def test_texts_have_the_same_tokens(found, ignores, tmp_path):
    tokenizer = with_splitter(found, ignores)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    llama = Llama(written(tmp_path, model, tokenizer))
    draw = random.Random(0)
    letters = sorted(set("".join(ODD)))
    drawn = ["".join(draw.choices([*letters, " ", "\n", "1"], k=30)) for _ in range(60)]
    for text in [*ODD, *drawn]:
        assert llama.ids(text) == tokenizer(text).input_ids, text


@pytest.mark.parametrize(
    ("tokenizer", "plain"),
    [
        (tiny_tokenizer(), []),
        (tiny_tokenizer(bos=True, template=LLAMA2), [1]),
        (tiny_tokenizer(bos=True), []),  # told: chats have none
    ],
)
def test_chats_have_the_same_prompt(tokenizer, plain, tmp_path):
    llama = Llama(written(tmp_path, tiny_model("llama"), tokenizer))
    chat = [{"role": "user", "content": "the boat"}]
    right = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert llama.ask("/apply-template", messages=chat)["prompt"] in (
        right,
        right.removeprefix("<bos>"),  # which it puts back as a token
    )
    done = llama.ask("/v1/chat/completions", messages=chat, max_tokens=1)
    ids = tokenizer(right, add_special_tokens=False).input_ids
    assert done["usage"]["prompt_tokens"] == len(ids)
    assert llama.ids("in") == [*plain, *tokenizer("in", add_special_tokens=False).input_ids]


def test_an_exported_adapter_answers_as_its_folder_does(tmp_path):
    base = folder_of(tmp_path / "base", tiny_model("llama"))
    export_model(moved(load_policy(base, CPU, lora_rank=3)), tmp_path / "adapter")
    for form in ("plain", "file"):
        config = ExportConfig(
            run=str(tmp_path / "adapter"), output=tmp_path / form, merge=True, gguf=form == "file"
        )
        export(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    ids = tiny_tokenizer()("the boat in").input_ids
    answer = greedy(model, ids, 30)
    assert Llama(tmp_path / "file" / "file-F32.gguf").greedy(ids, 30) == answer
    assert answer != greedy(AutoModelForCausalLM.from_pretrained(base).eval(), ids, 30)


@pytest.mark.slow
@pytest.mark.skipif(
    not fetch.is_fetched("smollm2-135m-instruct"), reason="run prefloop fetch-model first"
)
def test_a_real_model_answers_the_same(tmp_path):
    folder = fetch.model_folder("smollm2-135m-instruct")
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    write_gguf(folder, tmp_path / "model.gguf", torch.float32)
    llama, tokenizer = Llama(tmp_path / "model.gguf"), load_tokenizer(str(folder))
    for text in ODD:
        assert llama.ids(text) == tokenizer(text).input_ids, text
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for question in (
        "What is the capital of France?",
        "Count to ten.",
        "한국의 수도는?",
        "x = 1\n",
    ):
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert llama.ask("/apply-template", messages=chat)["prompt"] == text
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert llama.greedy(ids, 48) == greedy(model, ids, 48, ends={0, 2})
