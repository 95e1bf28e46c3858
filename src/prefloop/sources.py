"""One door for rows: a file, a folder, a hub id, a labelling store, or several of them by weight.

| source | rows of |
|---|---|
| `rows.jsonl` (`.jsonl.gz`, `.json`, `.csv`, `.parquet`) | a file |
| `NAME`, `NAME#CONFIG`, `NAME#CONFIG:SPLIT`, `NAME#:SPLIT` | a `datasets` folder or a hub id |
| `labels.db`, `labels.db#PROJECT`, a database URL | a labelling store |

Where several are given, each may end in `=WEIGHT`: see `prefloop.data.stream.mixed_order`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefloop.data import formats
from prefloop.data.formats import Kind, as_chat
from prefloop.errors import UserError
from prefloop.labelling.export import is_store, read_prompts, read_records
from prefloop.labelling.imports import unanswered
from prefloop.records import Conversation, Record, RowCounts
from prefloop.resume import read_record

Data = str | Sequence[str]


def load(
    data: Data,
    kind: Kind,
    counts: RowCounts,
    chat: bool = False,
    of: str = "--data",
    margins: bool = False,
) -> list[Any]:
    """The records of one or more sources, all used alike; `chat` takes strings for messages.

    `margins`: of labelling stores, by how strong and how sure the labellers said they were.
    """
    for source in (data,) if isinstance(data, str) else data:
        if _weighted(source)[1] is not None:
            raise UserError(
                f"{of} {source}: weights share out the rows of training, and here all are used; "
                "leave them out"
            )
    parts = load_parts(data, kind, counts, chat, of, margins)
    return [record for part in parts for record in part]


def load_parts(
    data: Data,
    kind: Kind,
    counts: RowCounts,
    chat: bool = False,
    of: str = "--data",
    margins: bool = False,
) -> list[list[Any]]:
    """The records of each source by itself, weighted or not; `of` is the setting's flag."""
    formats.require_kind(kind)
    addresses, _ = addresses_and_weights(data, of)
    if margins and of == "--data" and not any(map(is_store, addresses)):
        raise UserError(
            f"{of} {' '.join(addresses)}: --label-margins reads labelling stores, and none is "
            "given; leave it out (a file's own column `margin` is read as it is)"
        )
    return [_load(address, kind, counts, chat, margins) for address in addresses]


def load_unanswered(source: str, counts: RowCounts, chat: bool = False) -> list[Any]:
    """Prompts to be answered: of a labelling store, those that have no answer yet."""
    if not is_store(source):
        return load(source, "prompt", counts, chat)
    waiting = unanswered(source)
    counts.read += len(waiting)
    return _as_chats(waiting, counts) if chat else waiting


def addresses_and_weights(
    data: Data, of: str = "--data"
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Where the rows are, and the weight of each source; no weights where none is given.

    >>> addresses_and_weights(("a.jsonl=0.7", "x/y#main:train=0.3"))
    (('a.jsonl', 'x/y#main:train'), (0.7, 0.3))
    >>> addresses_and_weights("a.jsonl")
    (('a.jsonl',), ())
    """
    pairs = [_weighted(source) for source in ((data,) if isinstance(data, str) else data)]
    addresses = tuple(address for address, _ in pairs)
    weights = tuple(weight for _, weight in pairs if weight is not None)
    given = " ".join((data,) if isinstance(data, str) else data)
    if not addresses:
        raise UserError(f"{of} is empty; give rows")
    if twice := [address for address in addresses if addresses.count(address) > 1]:
        raise UserError(f"{of} {given}: {twice[0]} is given twice; give it once")
    if weights and len(weights) < len(pairs):
        raise UserError(f"{of} {given}: give each source a weight, as NAME=0.7, or none")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(f"{of} {given}: weights must be above 0; leave a source of 0 out")
    return addresses, weights if len(weights) > 1 else ()


def _weighted(source: str) -> tuple[str, float | None]:
    """`NAME=WEIGHT` apart; a file of just that name, or a URL's own `=`, has no weight."""
    match = re.fullmatch(r"(.+)=(\d+(?:\.\d*)?|\.\d+)", source)
    own = "://" in source and "#" not in source
    if match is None or own or Path(source).exists():
        return source, None
    return match[1], float(match[2])


def _load(source: str, kind: Kind, counts: RowCounts, chat: bool, margins: bool) -> list[Any]:
    if not is_store(source):
        return formats.load(source, kind, counts, chat)
    records: Sequence[Record]
    if kind == "prompt":
        records = read_prompts(source, counts)
    else:
        records = read_records(source, kind, counts, margins)
    return _as_chats(records, counts) if chat else list(records)


def _as_chats(records: Iterable[Record], counts: RowCounts) -> list[Any]:
    chats = []
    for record in records:
        try:
            chats.append(as_chat(record))
        except UserError as error:
            counts.bad_row(record.where, error)
    return chats


def strings_note(
    records: Sequence[Record],
    has_template: bool,
    template_args: Mapping[str, object] | None = None,
    model: str = "",
) -> str | None:
    """What is to be told where a chat model is given strings, and was not trained on them by us.

    UserError for `template_args` that nothing would read, for there are strings alone.
    """
    strings = sum(is_string(record) for record in records)
    if template_args and 0 < strings == len(records):
        raise UserError(
            f"--template-args {json.dumps(dict(template_args))} is read by the chat template, and "
            "all rows are strings, to which it is not applied; give --chat to take them for "
            "messages, or leave --template-args out"
        )
    if not strings or not has_template or text_of(model) == text_kind(records) == "strings":
        return None
    which = "the rows are" if strings == len(records) else f"{strings} of {len(records)} rows are"
    return f"{which} strings: the chat template is not applied; --chat takes them for messages"


def text_kind(records: Sequence[Record]) -> str:
    """Whether rows are `strings`, `messages` or `mixed`."""
    kinds = {"strings" if is_string(record) else "messages" for record in records}
    return kinds.pop() if len(kinds) == 1 else "mixed"


def text_of(model: str) -> str | None:
    """What the run that made this model was trained on, as `text_kind` says; None if unknown."""
    folder = Path(model)
    record = read_record(folder) or (read_record(folder.parent) if folder.is_dir() else None)
    return (record or {}).get("text")


def is_string(record: Record) -> bool:
    """Whether a record is plain text, and not a chat."""
    return not isinstance(record, Conversation) and isinstance(record.prompt, str)
