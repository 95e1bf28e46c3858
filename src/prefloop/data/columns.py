"""What columns of a row and keys of a message mean: one table of all that is known.

Read: what a record is made of. Refused: what would change a row's meaning and cannot be used. All
else is a note of its owner: carried along by `sample`, and listed once by `check`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefloop.errors import UserError
from prefloop.files import plain

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
VERDICTS = ("tiers", "label", "margin", "judged", "raters", "priority", "scores")
"""What is said of a row's answers."""
ANSWERS = (
    *"finish_reasons completion_ids log_probs tokenizer model weights seed sampling".split(),
    *(f"{name}_{of}" for name in TEXTS[1:4] for of in ("ids", "finish_reason")),
)
"""What `sample` says of how it came by them."""
HEADS = ("system", "system_prompt", "system_message", "system_instruction")
TOOLS = "tools"
OF_ANSWERS = frozenset((*TEXTS[1:], *VERDICTS, *ANSWERS, "labeller"))
"""Columns that speak of a row's answers: new answers to its prompt take none of them along."""
ORIGINS = frozenset(("model", "weights", "seed", "sampling", "tokenizer", "label", "labeller"))
"""Those of them that may as well speak of a prompt that has no answers."""

OTHER_NAMES = frozenset(
    "answer answers response responses generation generations output outputs candidate candidates "
    "continuation continuations reply replies completion completions".split()
)
"""What others call answers, alone or in a longer name: `response_a`, `model-output`."""

KINDS = r"(image|img|picture|photo|audio|video|pixel_value)s?"
MEDIA = re.compile(KINDS + r"(_?(url|path|file|byte|data|base64|b64|\d+))?s?", re.IGNORECASE)
TOOLS_AS = "give the tools as `tools`, as chat templates take them"
LOSS_AS = "mark single turns with `train`, or leave the column out"
REFUSED = {
    **dict.fromkeys(("functions", "available_tools", "tool_definitions"), TOOLS_AS),
    **dict.fromkeys(("loss_mask", "completion_mask", "assistant_masks"), LOSS_AS),
    "documents": "put them into the prompt's text",
    "history": "give the whole conversation as messages",
    "chat_template_kwargs": "give the same to all rows with --template-args",
}
"""Columns and what to do about them."""
WEIGHTS = ("weight", "sample_weight", "loss_weight")  # of a row in the loss: all weigh 1

ROLES = ("system", "developer", "user", "assistant", "tool")
FOREIGN_ROLES = (
    dict.fromkeys("human prompter".split(), "user")
    | dict.fromkeys("gpt bot ai model chatbot chatgpt claude bard bing llm".split(), "assistant")
    | dict.fromkeys("function observation tool_response tool_result".split(), "tool")
    | {"function_response": "tool"}
)
CALLS = ("function_call", "function_calls", "tool_call", "tool_calls")  # roles and keys
MESSAGE_KEYS = frozenset({"role", "content", "from", "value"})
FLAGS = dict.fromkeys(
    "weight train training trainable trained loss loss_mask loss_weight".split(), True
) | dict.fromkeys("masked ignore_loss no_loss".split(), False)
"""Of an assistant's turn: is the key's truth that the turn is trained?"""
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
    return next((f for f in FORMS[kind] if all(row.get(name) is not None for name in f)), ())


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
        if (what := _not_json(value)) is not None:
            raise UserError(
                f"{where}: column `{name}` holds {what}, which a row of JSON cannot; leave it out"
            )
    return kept


def _not_json(value: object) -> str | None:
    """What of a value no file of JSON can hold."""
    if isinstance(value, dict | list | tuple):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        if isinstance(value, dict) and any(not isinstance(key, str) for key in value):
            return "a key that is no text"
        return next((what for what in map(_not_json, parts) if what is not None), None)
    if isinstance(value, str):
        return "half a character" if re.search("[\ud800-\udfff]", value) else None
    if value is None or isinstance(value, bool | int | float):
        return None
    return "bytes" if isinstance(value, bytes) else f"a {type(value).__name__}"
