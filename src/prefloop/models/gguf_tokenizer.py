"""A byte-level BPE tokenizer in llama.cpp's terms: GGUF's `tokenizer.*` fields.

llama.cpp has its own code for each way of splitting a text before the merges, and the file only
names it. Which name is right is told by what the tokenizer does with probes, not by its own name.
Left as it is: control characters that a vocabulary has no token for are dropped by both, but only
here before the merges.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from prefloop.data.encoder import ASKED, Encoder
from prefloop.errors import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # GGUF's types of tokens
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = " \t\n\r'sA1½٣가あ\u0301ē._$😀\u00a0\u200b"
"""One character of each kind that pre-tokenizers tell apart."""
ENDINGS = "'s 't 're 've 'm 'll 'd 'S 'T 'Re 'VE 'M 'lL 'D 'x".split()
Value = bool | int | float | str | Sequence[int] | Sequence[str]


def refuse(what: str) -> NoReturn:
    """UserError for what llama.cpp is not known to compute as Transformers does."""
    raise UserError(f"--gguf: {what}; leave --gguf out, or try llama.cpp's own converter")


def tokenizer_fields(
    tokenizer: PreTrainedTokenizerBase, rows: int, stops: Iterable[int]
) -> dict[str, Value]:
    """GGUF's fields for a model of `rows` embeddings whose answers end with one of `stops`."""
    core: dict[str, Any] = json.loads(_backend(tokenizer).to_str())
    model = core["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or "Ġ" not in model["vocab"]:
        refuse("its tokenizer is not a byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            refuse(f"its tokenizer has the option {name} ({model[name]!r})")
    if not {step["type"] for step in _steps(core["normalizer"])} <= {"NFC"}:
        refuse("its tokenizer changes texts before it splits them, and not to NFC")
    name = pre_tokenizer_name(_backend(tokenizer).pre_tokenizer, bool(model.get("ignore_merges")))
    missing = [c for b, c in _byte_letters().items() if c not in model["vocab"] and _occurs(b)]
    if missing and model.get("unk_token"):
        refuse(f"its vocabulary lacks {len(missing)} bytes, read as {model['unk_token']}")
    tokens, types = _vocabulary(core, rows)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if not merges or any(merge.count(" ") != 1 for merge in merges):
        refuse("its tokenizer has no merges, or merges across spaces")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        **dict(_special_tokens(tokenizer, stops)),
        **dict(_templates(tokenizer)),
    }


def cautions(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Where llama.cpp will not do as Transformers does, in a line each."""
    if _steps(json.loads(_backend(tokenizer).to_str())["normalizer"]):
        yield "the tokenizer brings texts into NFC, which llama.cpp does not: give it NFC"
    if Encoder(tokenizer).leading and not adds_bos(tokenizer):
        yield (
            f"the chat template prints no {tokenizer.bos_token}, which the tokenizer puts before "
            "plain texts: llama.cpp is told to put it before none"
        )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether llama.cpp is to begin each text with BOS.

    It does so with chats, too, unless the template printed it: so never where templates print none.
    """
    leading = Encoder(tokenizer).leading
    if leading and leading != [tokenizer.bos_token_id]:
        refuse(f"its tokenizer begins texts with other tokens than BOS ({leading})")
    if not leading or not tokenizer.chat_template:
        return bool(leading)
    with suppress(UserError):  # a template that refuses a question alone
        text = Encoder(tokenizer).render(ASKED, generation_prompt=True)
        return text.startswith(str(tokenizer.bos_token))
    return True


def pre_tokenizer_name(splitter: Any, ignore_merges: bool) -> str:
    """llama.cpp's name of a pre-tokenizer that splits all probes as this one does.

    `ignore_merges`: words that are tokens are taken whole, which comes with the name there.
    """
    if splitter is not None:
        own = splitter.pre_tokenize_str
        for name, ignores, known in _known():
            split = known.pre_tokenize_str
            if ignores == ignore_merges and all(own(probe) == split(probe) for probe in _probes()):
                return name
    refuse("its tokenizer splits texts in a way that has no known name there")


def _known() -> Iterator[tuple[str, bool, Any]]:
    """Name, whether merges are ignored, and what splits so here."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    yield "gpt-2", False, words
    yield "smollm", False, pre_tokenizers.Sequence([digits, words])
    for name, ignores, count in (
        ("qwen2", False, ""),
        ("llama-bpe", True, "{1,3}"),
        ("dbrx", False, "{1,3}"),
    ):
        split = pre_tokenizers.Split(Regex(WORDS.replace("DIGITS", count)), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        yield name, ignores, pre_tokenizers.Sequence([split, plain])


def _probes() -> Iterator[str]:
    """All texts of up to three characters of different kinds, and longer ones drawn from them."""
    yield from (f"{before}{ending}b" for ending in ENDINGS for before in ("", "a", " ", "1"))
    for length in (1, 2, 3):
        yield from map("".join, itertools.product(KINDS, repeat=length))
    draw = random.Random(0)
    for _ in range(2000):
        yield "".join(draw.choices([*KINDS, *ENDINGS, "  ", "12", "\n\n"], k=12))


def _vocabulary(core: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Each row's token and its type; rows that no token has are named by their number."""
    tokens = {number: token for token, number in core["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for token in core["added_tokens"]:
        if options := [o for o in ("lstrip", "rstrip", "single_word") if token[o]]:
            refuse(f"its token {token['content']} has the option {options[0]}")
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if max(tokens) >= rows:
        refuse(f"its tokenizer has the token {tokens[max(tokens)]}, the model no row for it")
    named = [tokens.get(row, f"[PAD{row}]") for row in range(rows)]
    if len(set(named)) < rows:
        refuse("its tokenizer has one token under two ids")
    return named, [types.get(row, UNUSED) for row in range(rows)]


def _special_tokens(
    tokenizer: PreTrainedTokenizerBase, stops: Iterable[int]
) -> Iterator[tuple[str, Value]]:
    """Which token begins a text, which end an answer, and which pads."""
    eos = tokenizer.eos_token_id
    if eos is None:
        refuse("its tokenizer names no token that ends an answer (eos_token)")
    others = sorted(set(stops) - {eos})
    if len(others) > 2:
        refuse(f"{len(others) + 1} tokens end its answers, and a file names three at most")
    if tokenizer.bos_token_id is None and "bos_token" in str(tokenizer.chat_template):
        refuse("its chat template prints a bos_token that the tokenizer does not have")
    ids = {
        # Without one, llama.cpp takes token 11 for it; what is never put anywhere may be EOS.
        "bos": eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos": eos,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
        **dict(zip(("eot", "eom"), others, strict=False)),
    }
    for name, number in ids.items():
        if number is not None:
            yield f"tokenizer.ggml.{name}_token_id", number
    yield "tokenizer.ggml.add_bos_token", adds_bos(tokenizer)
    plain, full = (Encoder(tokenizer).ids("a", specials=which) for which in (False, True))
    if full != [*Encoder(tokenizer).leading, *plain]:
        refuse("its tokenizer puts tokens behind a text")
    yield "tokenizer.ggml.add_eos_token", False


def _templates(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, Value]]:
    """The chat template, if there is one."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        refuse(f"it has several chat templates ({', '.join(template)})")
    if template:
        yield "tokenizer.chat_template", template


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        refuse(f"its tokenizer ({type(tokenizer).__name__}) is not one of the tokenizers package")
    return backend


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The normalizers in a normalizer."""
    if normalizer is None:
        return []
    return list(normalizer["normalizers"]) if normalizer["type"] == "Sequence" else [normalizer]


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte: itself where it prints, else the next free one."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in prints]
    return {b: chr(b) for b in prints} | {b: chr(256 + n) for n, b in enumerate(hidden)}


def _occurs(byte: int) -> bool:
    """Whether UTF-8 has the byte."""
    return byte < 0xC0 or 0xC2 <= byte <= 0xF4
