"""`prefloop check`: what training would make of some rows and a chat template, without training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from transformers import PreTrainedTokenizerBase

from prefloop import sources
from prefloop.config import CheckConfig
from prefloop.config.ranges import template_arguments
from prefloop.data.encoder import Encoder
from prefloop.data.tokenize import Example, audit_template, check_ids, tokenize
from prefloop.errors import UserError, located
from prefloop.models.load import embedding_rows, load_tokenizer
from prefloop.records import Conversation, Ranking, Record, RowCounts, Text
from prefloop.terminal import shown

MOST_BAD = 10
"""Bad rows that are told one by one."""


def check(config: CheckConfig) -> None:
    """Print the template's audit, the rows' count and lengths, and the first row as trained.

    All bad rows are counted and the first ten told; then they are an error, or what `--bad-rows
    drop` leaves out.
    """
    assert config.model is not None
    arguments = template_arguments(config.template_args)
    tokenizer = load_tokenizer(config.model, arguments)
    encoder = Encoder(tokenizer, arguments)
    for line in audit_template(encoder).lines():
        print(shown(line))
    if config.data is None:
        return
    counts = RowCounts(bad_rows="list" if config.bad_rows == "error" else "drop")
    rows = embedding_rows(config.model)

    def known(record: Record, example: Example) -> None:
        if rows is not None:
            check_ids(example, rows, tokenizer)

    records: list[Record] = []
    examples: list[Example] = []
    try:
        parts = sources.load_parts(config.data, config.kind, counts, config.chat)
        records = [record for part in parts for record in part]
        limits = (config.max_length, config.truncation)
        examples = tokenize(records, encoder, *limits, counts, require=known)
    except UserError:
        if not counts.bad:
            raise
    print(counts.summary())
    for what, count in counts.noted.items():
        print(shown(f"note: {what} ({count} rows)"))
    for line in (*_forms(records, tokenizer, arguments), *_bad(counts)):
        print(shown(line))
    if examples:
        print(_lengths("prompt", [len(example.prompt) for example in examples]))
        if answers := [len(answer) for example in examples for answer in example.answers]:
            print(_lengths("answer", answers))
        print(shown(_first(tokenizer, examples[0])))
    if counts.bad and (config.bad_rows == "error" or not examples):
        where, problem = counts.bad[0]
        count = len(counts.bad)
        others = f" (and {count - 1} more bad rows, told above)" if count > 1 else ""
        raise UserError(f"{located(where)}{problem}{others}; --bad-rows drop leaves bad rows out")


def _bad(counts: RowCounts) -> Iterator[str]:
    for where, problem in counts.bad[:MOST_BAD]:
        yield f"bad row: {located(where)}{problem}"
    if len(counts.bad) > MOST_BAD:
        yield f"bad rows: {len(counts.bad)} in all, the first {MOST_BAD} are told"


def _forms(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    template_args: Mapping[str, object],
) -> Iterator[str]:
    """What the rows' texts are, where that may not be what was meant."""
    strings = sum(map(sources.is_string, records))
    if 0 < strings < len(records):
        chats = len(records) - strings
        yield f"warning: mixed forms: {strings} rows are strings, {chats} are chat messages"
    if note := sources.strings_note(records, bool(tokenizer.chat_template), template_args):
        yield f"warning: {note}"
    specials = [token for token in tokenizer.all_special_tokens if token.strip()]
    rows: Counter[str] = Counter()
    first: dict[str, str] = {}
    for record in records:
        texts = list(_texts(record))
        for token in specials:
            if any(token in text for text in texts):
                rows[token] += 1
                first.setdefault(token, record.where)
    for token, count in rows.items():
        yield (
            f"warning: {count} rows hold the special token {token} in their texts, the first at "
            f"{first[token]}; it is read as that token, not as text"
        )


def _texts(record: Record) -> Iterator[str]:
    """Every text of a record."""
    if isinstance(record, Conversation):
        whole: list[Text] = [record.messages]
    elif isinstance(record, Ranking):
        whole = [record.prompt, *record.completions]
    else:
        names = ("prompt", "completion", "chosen", "rejected")
        whole = [getattr(record, name) for name in names if hasattr(record, name)]
    for text in whole:
        yield from [text] if isinstance(text, str) else (message.content for message in text)


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
