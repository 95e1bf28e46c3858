"""`prefloop check`: what training would make of some rows and a chat template, without training."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter

from transformers import PreTrainedTokenizerBase

from prefloop.config import CheckConfig
from prefloop.data import formats
from prefloop.data.tokenize import Example, audit_template, check_ids, tokenize
from prefloop.models.load import embedding_rows, load_tokenizer
from prefloop.records import RowCounts
from prefloop.terminal import shown


def check(config: CheckConfig) -> None:
    """Print the template's audit, the rows' count and lengths, and the first row as trained."""
    tokenizer = load_tokenizer(config.model)
    for line in audit_template(tokenizer).lines():
        print(shown(line))
    if config.data is None:
        return
    counts = RowCounts()
    records = formats.load(config.data, config.kind, counts)
    examples = tokenize(records, tokenizer, config.max_length, config.truncation, counts)
    if rows := embedding_rows(config.model):
        for example in examples:
            check_ids(example, rows, tokenizer)
    print(counts.summary())
    for what, count in counts.noted.items():
        print(shown(f"note: {what} ({count} rows)"))
    print(_lengths("prompt", [len(example.prompt) for example in examples]))
    if answers := [len(answer) for example in examples for answer in example.answers]:
        print(_lengths("answer", answers))
    print(_first(tokenizer, examples[0]))


def _lengths(name: str, lengths: list[int]) -> str:
    ordered = sorted(lengths)
    median, high = ordered[len(ordered) // 2], ordered[len(ordered) * 95 // 100]
    return f"{name} tokens: median {median}, 95 % up to {high}, longest {ordered[-1]}"


def _first(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The first row with what the loss is taken over in [[double brackets]]."""
    lines = [f"first row ({example.where}): {tokenizer.decode(list(example.prompt))!r}"]
    for answer, mask in zip(example.answers, example.answer_masks, strict=True):
        text = ""
        for counted, run in groupby(zip(answer, mask, strict=True), key=itemgetter(1)):
            said = str(tokenizer.decode([token for token, _ in run]))
            text += f"[[{said}]]" if counted else said
        lines.append(f"  answer: {text!r}")
    return "\n".join(lines)
