"""What columns of a row and keys of a message mean: one table of all that is known.

Read: what a record is made of. Refused: what would change a row's meaning and cannot be used. All
else is a note of its owner: carried along by `sample`, and listed once by `check`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefloop.errors import UserError

Row = Mapping[str, Any]

CHATS = ("messages", "conversations", "conversation")
TEXTS = ("prompt", "completion", "chosen", "rejected", "completions", *CHATS)
FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "demonstration": (*((name,) for name in CHATS), ("prompt", "completion")),
    "preference": (("prompt", "completions", "tiers"), ("chosen", "rejected")),
    "unpaired": (("prompt", "completion", "label"), ("chosen", "rejected")),
    "prompt": (("prompt",), ("chosen", "rejected")),
}
"""The columns that a row of each kind needs, the first that are all there."""
VERDICTS = ("tiers", "label", "margin", "judged", "priority", "scores")
"""What is said of a row's answers."""
ANSWERS = (
    *("finish_reasons", "completion_ids", "log_probs", "tokenizer", "model", "weights", "seed"),
    *("sampling", "chosen_ids", "rejected_ids", "chosen_finish_reason", "rejected_finish_reason"),
    "completion_finish_reason",
)
"""What `sample` says of how it came by them."""
HEADS = ("system", "system_prompt", "system_message", "system_instruction")
TOOLS = "tools"
OF_ANSWERS = frozenset((*TEXTS[1:5], *VERDICTS, *ANSWERS, "labeller"))
"""Columns that speak of a row's answers: new answers to its prompt take none of them along."""
SIDES = re.compile(r"(^|[\W_])(chosen|rejected)([\W_]|$)")
"""In a name: said of a pair's answers, as `score_chosen`."""

OTHER_NAMES = frozenset(
    "answer answers response responses generation generations output outputs candidate candidates "
    "continuation continuations reply replies".split()
)
"""What others call answers: a row with one of these is no prompt that waits for answers."""

MEDIA = re.compile(
    r"(image|img|picture|photo|audio|video|pixel_value)s?"
    r"(_?(url|path|file|byte|data|base64|b64|\d+))?s?",
    re.IGNORECASE,
)
REFUSED = {
    **dict.fromkeys(
        ("functions", "available_tools", "tool_definitions"),
        "give the tools as `tools`, as chat templates take them",
    ),
    **dict.fromkeys(
        ("loss_mask", "completion_mask", "assistant_masks"),
        "mark single turns with `train`, or leave the column out",
    ),
    "documents": "put them into the prompt's text",
    "history": "give the whole conversation as messages",
    "chat_template_kwargs": "give the same to all rows with --template-args",
}
"""Columns and what to do about them."""
WEIGHTS = ("weight", "sample_weight", "loss_weight")
"""Of a row in the loss: all weigh 1."""

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
    "claude": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "llm": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
}
"""Roles as other programs call them."""
CALLS = ("function_call", "function_calls", "tool_call", "tool_calls")
"""Roles and keys of calls, which `content` alone does not hold."""
MESSAGE_KEYS = frozenset({"role", "content", "from", "value"})
FLAGS = {  # of an assistant's turn: is the key's truth that the turn is trained?
    "weight": True,
    "train": True,
    "training": True,
    "trainable": True,
    "trained": True,
    "loss": True,
    "loss_mask": True,
    "loss_weight": True,
    "masked": False,
    "ignore_loss": False,
    "no_loss": False,
}
UNREAD = frozenset(
    "reasoning_content reasoning reasoning_details thinking thinking_blocks thought tools "
    "functions documents files attachments parts prefix partial mask train_detail training_detail "
    "tool_plan refusal".split()
).union(CALLS)
"""Keys of a message that would be lost by reading role and content alone."""


def is_media(name: str) -> bool:
    """Whether a column or key of this name holds pictures, sound or film."""
    return bool(MEDIA.fullmatch(name))


def is_empty(value: object) -> bool:
    """Nothing, or what holds nothing else: as good as a column that is not there."""
    if isinstance(value, dict | list | tuple):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value is None or (isinstance(value, str) and value.strip() in ("", "[]", "{}"))


def form_of(row: Row, kind: str) -> tuple[str, ...]:
    """The columns that make a record of the kind; none where the row fits no form."""
    forms = FORMS[kind]
    return next((f for f in forms if all(row.get(name) is not None for name in f)), ())


def check_columns(row: Row, kind: str, where: str) -> None:
    """UserError for a column that changes what the row means and cannot be used."""
    known = (*TEXTS, *HEADS, TOOLS, *REFUSED)
    for name, value in row.items():
        if is_empty(value):
            continue
        plain = re.sub(r"[\s-]+", "_", name.strip().lower())
        if plain != name and plain in known and plain not in row:
            raise UserError(f"{where}: column `{name}`; did you mean `{plain}`? rename it")
        remedy = REFUSED.get(name)
        if is_media(name):
            remedy = "prefloop reads text alone; remove the row, or the column"
        elif name in WEIGHTS and kind != "prompt" and str(value).strip() not in ("1", "1.0"):
            remedy = "all rows weigh the same in the loss; leave the column out, or the row"
        if remedy is not None:
            raise UserError(f"{where}: column `{name}` cannot be used: {remedy}")


def is_of_answers(name: str) -> bool:
    """Whether a column speaks of a row's answers: new ones take none of it along."""
    return name in OF_ANSWERS or bool(SIDES.search(name))


def carried(row: Row, where: str) -> dict[str, object]:
    """The columns that stay true of a prompt with new answers; UserError for one JSON lacks."""
    kept = {name: value for name, value in row.items() if not is_of_answers(name)}
    for name, value in kept.items():
        if (what := _not_json(value)) is not None:
            raise UserError(
                f"{where}: column `{name}` holds {what}, which a row of JSON cannot; leave it out"
            )
    return kept


def _not_json(value: object) -> str | None:
    """What of a value no file of JSON can hold."""
    if isinstance(value, dict | list | tuple):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next((what for what in map(_not_json, parts) if what is not None), None)
    if isinstance(value, str):
        return "half a character" if re.search("[\ud800-\udfff]", value) else None
    known = value is None or isinstance(value, bool | int | float)
    return None if known else "bytes" if isinstance(value, bytes) else f"a {type(value).__name__}"
