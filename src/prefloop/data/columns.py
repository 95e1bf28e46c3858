"""What columns of a row and keys of a message mean: one table of all that is known.

Read: what a record is made of. Refused: what would change a row's meaning and cannot be used. All
else is a note of its owner: carried along by `sample`, and listed once by `check`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from prefloop.errors import UserError, first_line
from prefloop.files import plain

Row = Mapping[str, Any]

TEXTS = ("prompt", "completion", "chosen", "rejected", "completions", "messages", "conversations")
VERDICTS = ("tiers", "label", "margin", "judged", "priority", "scores")
"""What is said of a row's answers."""
ANSWERS = (
    *("finish_reasons", "completion_ids", "log_probs", "tokenizer", "model", "weights", "seed"),
    *("sampling", "chosen_ids", "rejected_ids", "chosen_finish_reason", "rejected_finish_reason"),
    "completion_finish_reason",
)
"""What `sample` says of how it came by them."""
HEADS = ("system", "system_prompt", "system_message")
TOOLS = "tools"
OF_ANSWERS = frozenset((*TEXTS[1:], *VERDICTS, *ANSWERS, "labeller"))
"""Columns that speak of a row's answers: new answers to its prompt take none of them along."""
ORIGINS = frozenset(("model", "weights", "seed", "sampling", "tokenizer", "label", "labeller"))
"""Those of them that may as well speak of a prompt that has no answers."""
READ = frozenset((*TEXTS, *VERDICTS, *ANSWERS, *HEADS, TOOLS, "labeller"))

OTHER_NAMES = frozenset(
    "answer answers response responses generation generations output outputs candidate candidates "
    "continuation continuations reply replies completion completions".split()
)
"""What others call answers, alone or in a longer name: `response_a`, `model-output`."""

PICTURES = ("image", "images", "audio", "audios", "video", "videos")
REFUSED = dict.fromkeys(PICTURES, "prefloop reads text alone; remove the row, or the column") | {
    "functions": "give the tools as `tools`, as chat templates take them",
    "documents": "put them into the prompt's text",
    "history": "give the whole conversation as messages",
    "chat_template_kwargs": "give the same to all rows with --template-args",
}
"""Columns and what to do about them."""

ROLES = ("system", "developer", "user", "assistant", "tool")
FOREIGN_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""Roles as other programs call them."""
MESSAGE_KEYS = frozenset({"role", "content", "from", "value"})
FLAGS = {  # of an assistant's turn: is the key's truth that the turn is trained?
    "weight": True,
    "train": True,
    "training": True,
    "trainable": True,
    "loss": True,
    "loss_mask": True,
    "masked": False,
    "ignore_loss": False,
}
UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning", *PICTURES)
"""Keys of a message that would be lost by reading role and content alone."""


def is_empty(value: object) -> bool:
    """Nothing, or a list, mapping or text of nothing: as good as a column that is not there."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def check_columns(row: Row, where: str) -> None:
    """UserError for a column that changes what the row means and cannot be used."""
    for name, remedy in REFUSED.items():
        if not is_empty(row.get(name)):
            raise UserError(f"{where}: column `{name}` cannot be used: {remedy}")


def words(name: str) -> frozenset[str]:
    """The words of a column's name: `score_chosen2` has two."""
    return frozenset(re.findall(r"[^\W\d_]+", name.lower()))


def of_answers(name: str) -> bool:
    """Whether a column speaks of the row's answers in a way that prefloop reads or knows."""
    return name in OF_ANSWERS or bool(words(name) & {"chosen", "rejected"})


def like_answers(name: str) -> bool:
    """Whether a column that prefloop does not read may hold answers, by its name."""
    return not of_answers(name) and bool(words(name) & OTHER_NAMES)


def answered(row: Row) -> bool:
    """Whether a row holds answers, or was meant to: it is no prompt that waits for them."""
    names = (name for name in row.keys() - ORIGINS if not is_empty(row[name]))
    return any(of_answers(name) or like_answers(name) for name in names)


def carried(row: Row, where: str) -> dict[str, object]:
    """The columns that stay true of a prompt with new answers; UserError for one JSON lacks."""
    kept = {name: plain(value) for name, value in row.items() if not of_answers(name)}
    for name, value in kept.items():
        try:
            json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            told = f"{where}: column `{name}` holds what JSON cannot ({first_line(error)})"
            raise UserError(told + "; leave it out") from error
    return kept


def notes(row: Row) -> Iterator[str]:
    """What of a row was read under another name, or not at all, in words to be counted."""
    for name in ("completion_ids", "chosen_ids", "rejected_ids"):
        if not is_empty(row.get(name)) and is_empty(row.get("tokenizer")):
            yield f"column `{name}` not used: no `tokenizer` says whose tokens they are"
    for name in row:
        if name not in READ and name not in REFUSED:
            yield f"column `{name}` not used"
    lists = (row.get(name) for name in TEXTS)
    for message in (m for listed in lists if isinstance(listed, list) for m in listed):
        if not isinstance(message, dict):
            continue
        role = message.get("role", message.get("from"))
        if isinstance(role, str) and role.lower() in FOREIGN_ROLES:
            yield f"role `{role}` read as {FOREIGN_ROLES[role.lower()]}"
        for key, value in message.items():
            if key not in MESSAGE_KEYS and key not in FLAGS and not is_empty(value):
                yield f"messages' key `{key}` not used"
