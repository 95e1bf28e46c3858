"""A cell of a row -> a text: a string, or chat messages in whichever way they were written."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from prefloop.data.columns import FLAGS, FOREIGN_ROLES, HEADS, ROLES, TOOLS, UNREAD, is_empty
from prefloop.errors import UserError
from prefloop.files import json_type
from prefloop.records import Message, Text

LISTED = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
"""How a list of messages begins, as JSON, Python or NumPy write it."""
BETWEEN = re.compile(r"\}\s*\n\s*\{")  # NumPy puts no comma there


def text(value: object, name: str, where: str) -> Text:
    """A string, or messages: a list of them, or its text in a cell."""
    if isinstance(value, str) and LISTED.match(value):
        value = _listed(value, name, where)
    if isinstance(value, list):
        return messages(value, name, where)
    return string(value, name, where, "a string or a list of messages")


def string(value: object, name: str, where: str, wanted: str = "a string") -> str:
    """A string of whole characters."""
    if not isinstance(value, str):
        raise UserError(f"{where}: `{name}` is of type {json_type(value)}; it must be {wanted}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: `{name}` holds half a character (\\u{ord(value[error.start]):04x} at "
            f"{error.start}); remove it"
        ) from error
    return value


def decoded(value: object, name: str, where: str) -> object:
    """A list that a cell may hold as text."""
    if not isinstance(value, str):
        return value
    if LISTED.match(value):
        return _listed(value, name, where)
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{where}: `{name}` must be a list (in CSV: as JSON)") from error


def _listed(value: str, name: str, where: str) -> object:
    """A list of messages in a string: as JSON, or as Python's or NumPy's repr."""
    for read in (json.loads, ast.literal_eval, lambda v: ast.literal_eval(BETWEEN.sub("}, {", v))):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        keys = ({"role", "content"}, {"from", "value"})
        if isinstance(found, list) and all(isinstance(item, dict) for item in found):
            if any(pair <= item.keys() for item in found for pair in keys):
                return found
            return value  # somebody's list of other things
    raise UserError(
        f"{where}: `{name}` looks like a list of messages and is not JSON; write it with json.dumps"
    )


def messages(value: object, name: str, where: str) -> tuple[Message, ...]:
    """Messages of known roles; UserError for what they hold and could not be learned from."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `{name}` must be a list of messages, and not empty")
    return tuple(_message(item, f"{name}[{i}]", where) for i, item in enumerate(value))


def _message(item: object, field: str, where: str) -> Message:
    if not isinstance(item, dict):
        raise UserError(
            f"{where}: `{field}` is a {json_type(item)}; a message needs `role` and `content`"
        )
    if {"from", "value"} <= item.keys() and "role" not in item:  # ShareGPT's names
        names = ("from", "value")
    elif {"role", "content"} <= item.keys():
        names = ("role", "content")
    else:
        raise UserError(
            f"{where}: `{field}` is {', '.join(map(str, item))}; a message needs `role` and "
            "`content`"
        )
    for key in UNREAD:
        if not is_empty(item.get(key)):
            raise UserError(
                f"{where}: `{field}.{key}` cannot be learned from; put it into `content` or "
                "remove it"
            )
    role = _role(string(item[names[0]], f"{field}.{names[0]}", where), f"{field}.{names[0]}", where)
    content = _content(item[names[1]], f"{field}.{names[1]}", where)
    return Message(role, content, _is_trained(item, field, where))


def _role(role: str, field: str, where: str) -> str:
    known = FOREIGN_ROLES.get(role.lower(), role)
    if role == "function_call" or not role:
        raise UserError(f"{where}: `{field}` is {role!r}, which cannot be learned from; remove it")
    near = get_close_matches(role, ROLES, cutoff=0.8) or [r for r in ROLES if r == role.lower()]
    if known not in ROLES and near:
        raise UserError(f"{where}: `{field}` is {role!r}; did you mean {near[0]}?")
    return known


def _content(value: object, field: str, where: str) -> str:
    """A string, or text parts joined."""
    if value is None:
        raise UserError(f"{where}: `{field}` is null; write its text, or remove the message")
    if not isinstance(value, list):
        return string(value, field, where, "a string, or a list of text parts")
    parts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else json_type(part)
        if not isinstance(part, dict) or kind != "text":
            raise UserError(
                f"{where}: `{field}[{number}]` is a part of type {kind}; prefloop reads text alone"
            )
        parts.append(string(part.get("text"), f"{field}[{number}].text", where))
    return "".join(parts)


def _is_trained(item: Mapping[str, Any], field: str, where: str) -> bool:
    """Whether no flag keeps the turn out of the loss."""
    trained = True
    for key, means_trained in FLAGS.items():
        value = item.get(key)
        if value is None:
            continue
        if value not in (0, 1):  # true and false are too
            raise UserError(
                f"{where}: `{field}.{key}` is {value!r}; a turn is trained or not: give 0 or 1"
            )
        trained &= bool(value) == means_trained
    return trained


def head(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """What a row's `tools` and `system` columns put before its messages."""
    found = []
    tools = row.get(TOOLS)
    if isinstance(tools, str) and tools.strip():
        tools = decoded(tools, TOOLS, where)
    if not is_empty(tools):
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UserError(f"{where}: `tools` must be a list of objects, as chat templates take")
        found.append(Message(TOOLS, json.dumps(tools, ensure_ascii=False)))
    for name in HEADS:
        if not is_empty(row.get(name)):
            found.append(Message("system", string(row[name], name, where)))
    return tuple(found)


def with_head(prompt: Text, before: tuple[Message, ...], where: str) -> Text:
    """The prompt after its tools and system text; UserError where it is a string."""
    if not before:
        return prompt
    if isinstance(prompt, str):
        name = "tools" if before[0].role == TOOLS else "system"
        raise UserError(
            f"{where}: a `{name}` column beside a prompt that is a string; give the row as "
            "messages, or --chat to take strings for them"
        )
    system = [message for message in before if message.role == "system"]
    own = [message for message in prompt if message.role in ("system", "developer")]
    if len(system) > 1 or (system and own and own != system):
        raise UserError(f"{where}: two system texts; keep one of them")
    return (*(m for m in before if m not in own), *prompt)
