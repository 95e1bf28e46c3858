"""Which rows are used, and which are held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

from prefloop.errors import UserError
from prefloop.records import Conversation, Prompt, Record, RowCounts, Text, text_to_json

AnyRecord = TypeVar("AnyRecord", bound=Record)


def prompt_of(record: Record) -> Text:
    """A record's prompt; a conversation's is all before its first assistant turn."""
    if not isinstance(record, Conversation):
        return record.prompt
    roles = [message.role for message in record.messages]
    return record.messages[: roles.index("assistant")]


def first_prompts(prompts: Sequence[Prompt], most: int, counts: RowCounts) -> list[Prompt]:
    """The first `most` prompts (0: all); the others are counted as dropped."""
    kept = list(prompts[: most or None])
    for _ in prompts[len(kept) :]:
        counts.drop("beyond --max-prompts")
    return kept


def split_by_prompt(
    records: Sequence[AnyRecord], fraction: float, seed: int
) -> tuple[list[AnyRecord], list[AnyRecord]]:
    """Split into (train, held out) with all rows of one prompt on the same side.

    The `fraction` of the distinct prompts (at least one of each side) whose hash with the seed is
    smallest is held out: the order of the rows plays no part.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"eval_fraction is {fraction}; it must be at least 0 and below 1")
    if fraction == 0:
        return list(records), []
    keys = [_prompt_key(record, seed) for record in records]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise UserError(
            f"eval_fraction is {fraction}, but all rows share one prompt, and none can be held "
            "out; give --eval-data"
        )
    size = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    held = set(distinct[:size])
    sides: tuple[list[AnyRecord], list[AnyRecord]] = ([], [])
    for key, record in zip(keys, records, strict=True):
        sides[key in held].append(record)
    return sides


def _prompt_key(record: Record, seed: int) -> bytes:
    key = json.dumps([seed, text_to_json(prompt_of(record))])
    return blake2b(key.encode(), digest_size=16).digest()
