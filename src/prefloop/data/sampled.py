"""What a row says of how its answers were sampled: token ids, and whether they ended."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefloop.data.messages import decoded
from prefloop.errors import UserError
from prefloop.records import Sampled

Row = Mapping[str, Any]
FINGERPRINT = re.compile(r"[0-9a-f]{16}")  # as `sample` names a tokenizer
REASONS = {"stop": True, "eos": True, "length": False}


def samples(row: Row, where: str, *names: str) -> tuple[Sampled, ...]:
    """Of single answers, by `NAME_ids` and `NAME_finish_reason`; empty where nothing is said."""
    reasons = [row.get(f"{name}_finish_reason") for name in names]
    ids = [decoded(row.get(f"{name}_ids"), f"{name}_ids", where) for name in names]
    return _samples(reasons, ids, row, where)


def samples_of_list(row: Row, where: str, count: int) -> tuple[Sampled, ...]:
    """Of `completions`, by `completion_ids` and `finish_reasons`."""
    columns: list[list[Any]] = []
    for name in ("finish_reasons", "completion_ids"):
        value = decoded(row.get(name), name, where)
        if value is None:
            value = [None] * count
        if not isinstance(value, list) or len(value) != count:
            raise UserError(f"{where}: `{name}` must hold one entry for each of {count} answers")
        columns.append(value)
    return _samples(columns[0], columns[1], row, where)


def _samples(reasons: list[Any], ids: list[Any], row: Row, where: str) -> tuple[Sampled, ...]:
    if all(value is None for value in (*reasons, *ids)):
        return ()
    tokenizer = str(row.get("tokenizer") or "")
    sampled = []
    for reason, tokens in zip(reasons, ids, strict=True):
        if reason is not None and reason not in REASONS:
            raise UserError(f"{where}: a finish reason is {reason!r}; give stop or length")
        right = isinstance(tokens, list) and all(type(x) is int and x >= 0 for x in tokens)
        if tokens is not None and not right:
            raise UserError(f"{where}: token ids must be a list of whole numbers an answer")
        known = tuple(tokens) if tokens and FINGERPRINT.fullmatch(tokenizer) else ()
        ended = None if reason is None else REASONS[reason]
        sampled.append(Sampled(ended, known, tokenizer if known else ""))
    return tuple(sampled)
