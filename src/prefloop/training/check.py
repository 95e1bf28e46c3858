"""`prefloop check`: what training would make of some rows and a chat template, without training."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from prefloop.config import CheckConfig
from prefloop.data import formats
from prefloop.data.tokenize import Example, audit_template, encode_prompt, tokenize
from prefloop.models.load import load_tokenizer
from prefloop.records import Prompt, RowCounts


def check(config: CheckConfig) -> None:
    """Print the template's audit, the rows' count and lengths, and the first row as trained."""
    tokenizer = load_tokenizer(config.model)
    for line in audit_template(tokenizer).lines():
        print(line)
    if config.data is None:
        return
    counts = RowCounts()
    records = formats.load(config.data, config.kind, counts)
    if config.kind == "prompt":
        examples = [_prompt_only(tokenizer, record, i) for i, record in enumerate(records)]
        counts.used = len(examples)
    else:
        examples = tokenize(records, tokenizer, config.max_length, config.truncation, counts)
    print(counts.summary())
    print(_lengths("prompt", [len(example.prompt) for example in examples]))
    if answers := [len(answer) for example in examples for answer in example.answers]:
        print(_lengths("answer", answers))
    print(_first(tokenizer, examples[0]))


def _prompt_only(tokenizer: PreTrainedTokenizerBase, record: object, index: int) -> Example:
    assert isinstance(record, Prompt)
    ids = tuple(encode_prompt(tokenizer, record.prompt))
    return Example(prompt=ids, answers=(), answer_masks=(), index=index, where=record.where)


def _lengths(name: str, lengths: list[int]) -> str:
    ordered = sorted(lengths)
    median, high = ordered[len(ordered) // 2], ordered[len(ordered) * 95 // 100]
    return f"{name} tokens: median {median}, 95 % up to {high}, longest {ordered[-1]}"


def _first(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The first row with what the loss is taken over in [[double brackets]]."""
    lines = [f"first row ({example.where}): {tokenizer.decode(list(example.prompt))!r}"]
    for answer, mask in zip(example.answers, example.answer_masks, strict=True):
        text, inside = "", False
        for token, counted in zip(answer, mask, strict=True):
            text += "[[" if counted and not inside else "]]" if inside and not counted else ""
            text, inside = text + str(tokenizer.decode([token])), counted
        lines.append(f"  answer: {text + (']]' if inside else '')!r}")
    return "\n".join(lines)
