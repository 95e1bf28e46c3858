"""A cell of a row -> a text: a string, or chat messages in whichever way they were written."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from prefloop.data import columns
from prefloop.data.columns import FLAGS, FOREIGN_ROLES, HEADS, ROLES, TOOLS, is_empty, is_media
from prefloop.errors import UserError
from prefloop.files import json_type
from prefloop.records import Message, Text

PAIRS = (("role", "content"), ("from", "value"))
BEGINS = re.compile(r"""\s*(array\()?\s*["']?\s*[\[(]?\s*\{\s*\\?['"]""")
"""How messages begin, as JSON, Python or NumPy write them; a string may be quoted once more."""
KEYS = [[re.compile(rf"""['"]{key}\\?['"]\s*:""") for key in pair] for pair in PAIRS]
ARRAY = re.compile(r"\s*array\((.*?)(,\s*dtype=object)?\)\s*", re.DOTALL)
APART = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\}\s+\{""")
"""Strings, or the place between two objects where NumPy puts no comma."""
PARTS = re.compile(r"""\s*\[\s*\{\s*['"](type|text)['"]\s*:""")
TEXT_PARTS = ("text", "input_text", "output_text")


def text(value: object, name: str, where: str) -> Text:
    """A string, or messages: a list of them, or its text in a cell."""
    if isinstance(value, str):
        value = _listed(value, name, where)
    if isinstance(value, dict) and any(value.keys() >= set(pair) for pair in PAIRS):
        value = [value]
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
    listed = _listed(value, name, where)
    literal = _literal(value) if listed is value else listed
    if isinstance(literal, str):
        raise UserError(f"{where}: `{name}` must be a list (in CSV: as JSON)")
    return literal


def _literal(value: str) -> Any:
    """What JSON, or Python's or NumPy's repr, says; the string itself where it is none."""
    commas = APART.sub(lambda at: at[1] or "}, {", value)
    for read, said in ((json.loads, value), (ast.literal_eval, value), (ast.literal_eval, commas)):
        try:
            return read(said)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value


def _listed(value: str, name: str, where: str) -> Any:
    """Messages in a string, as JSON or as Python's or NumPy's repr; else the string as it is."""
    if not BEGINS.match(value) or not any(all(k.search(value) for k in pair) for pair in KEYS):
        return value
    array = ARRAY.fullmatch(value)
    bare = (array[1] if array else value).strip()
    literal = _literal(bare)
    if isinstance(literal, str) and literal != bare:  # quoted once more
        return _listed(literal, name, where)
    items = [literal] if isinstance(literal, dict) else literal
    objects = isinstance(items, list | tuple) and all(isinstance(item, dict) for item in items)
    if objects:
        role = str(items[0].get("role", items[0].get("from"))).lower()
        message = isinstance(literal, list | tuple) or role in ROLES or role in FOREIGN_ROLES
        if message and any(item.keys() >= set(pair) for item in items for pair in PAIRS):
            return list(items)
    if objects or bare[0] == "{":
        return value  # somebody's list of other things, or code
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
    for key, value in item.items():
        if (key in columns.UNREAD or is_media(key)) and value is not False and not is_empty(value):
            raise UserError(
                f"{where}: `{field}.{key}` cannot be learned from; put it into `content` or "
                "remove it"
            )
    role = _role(string(item[names[0]], f"{field}.{names[0]}", where), f"{field}.{names[0]}", where)
    content = _content(item[names[1]], f"{field}.{names[1]}", where)
    return Message(role, content, _is_trained(item, field, where))


def _role(role: str, field: str, where: str) -> str:
    known = FOREIGN_ROLES.get(role.lower(), role)
    if role.lower() in columns.CALLS or not role.strip():
        raise UserError(f"{where}: `{field}` is {role!r}, which cannot be learned from; remove it")
    near = get_close_matches(role, ROLES, cutoff=0.8) or [r for r in ROLES if r == role.lower()]
    if known not in ROLES and near:
        raise UserError(f"{where}: `{field}` is {role!r}; did you mean {near[0]}?")
    return known


def _content(value: object, field: str, where: str) -> str:
    """A string, or text parts joined."""
    if value is None or value == []:
        what = "null" if value is None else "an empty list"
        raise UserError(f"{where}: `{field}` is {what}; write its text, or remove the message")
    if isinstance(value, str) and PARTS.match(value):
        literal = _literal(value)
        whole = isinstance(literal, list) and all(
            isinstance(p, dict) and "type" in p for p in literal
        )
        value = literal if whole else value
    if not isinstance(value, list):
        return string(value, field, where, "a string, or a list of text parts")
    parts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else json_type(part)
        shown = (
            [k for k in part if is_media(k) and not is_empty(part[k])] if kind in TEXT_PARTS else []
        )
        if kind not in TEXT_PARTS or shown:
            raise UserError(
                f"{where}: `{field}[{number}]` is a part of type {(shown or [kind])[0]}; prefloop "
                "reads text alone"
            )
        parts.append(string(part.get("text"), f"{field}[{number}].text", where))
    return "".join(parts)


def _is_trained(item: Mapping[str, Any], field: str, where: str) -> bool:
    """Whether no flag keeps the turn out of the loss."""
    said = {key: item[key] for key in FLAGS if item.get(key) is not None}
    for key, value in said.items():
        if value not in (0, 1):  # true and false are too
            raise UserError(
                f"{where}: `{field}.{key}` is {value!r}; a turn is trained or not: give 0 or 1"
            )
    return all(bool(value) == FLAGS[key] for key, value in said.items())


def head(row: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """What a row's `tools` and `system` columns put before its messages."""
    before = []
    tools = _without_nulls(row.get(TOOLS))
    if isinstance(tools, str) and tools.strip():
        tools = _without_nulls(decoded(tools, TOOLS, where))
    if not is_empty(tools):
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UserError(f"{where}: `tools` must be a list of objects, as chat templates take")
        before.append(Message(TOOLS, json.dumps(tools, ensure_ascii=False)))
    for name in HEADS:
        if not is_empty(row.get(name)):
            before.append(Message("system", string(row[name], name, where)))
    return tuple(before)


def with_head(prompt: Text, before: tuple[Message, ...], where: str) -> Text:
    """The prompt after its tools and system text; UserError where it is a string."""
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


def _without_nulls(value: object) -> object:
    """Without the keys that a table's columns give to every object, null where it has none."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) for key, item in value.items() if item is not None}


# --- what was read otherwise, or not at all ------------------------------------------------------


def notes(row: Mapping[str, Any], kind: str) -> set[str]:
    """What of a row was read under another name, or not at all, in words to be counted."""
    form = columns.form_of(row, kind)
    read = {*form, *HEADS, TOOLS, *columns.ANSWERS, "labeller"}
    read |= {"prompt"} if "chosen" in form else set()
    read |= {"margin"} if kind == "preference" else set()
    remarks = set()
    for name in ("completion_ids", "chosen_ids", "rejected_ids"):
        if not is_empty(row.get(name)) and is_empty(row.get("tokenizer")):
            remarks.add(f"column `{name}` not used: no `tokenizer` says whose tokens they are")
    for name, value in row.items():
        if name in read or is_empty(value):
            continue
        gone = kind != "prompt" or columns.of_answers(name)
        answer = ", not taken for an answer" if columns.like_answers(name) else ""
        remarks.add(f"column `{name}` " + ("not used" if gone else f"carried along{answer}"))
    used = (row.get(name) for name in columns.TEXTS if name in read)
    for message in (item for value in used for item in _objects(value)):
        remarks.update(_notes_of_message(message))
    return remarks


def _objects(value: object) -> Iterator[dict[str, Any]]:
    """The messages of a cell, in whichever way it holds them."""
    if isinstance(value, str):
        value = _listed(value, "", "")
    if isinstance(value, dict):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _objects(item)


def _notes_of_message(message: Mapping[str, Any]) -> Iterator[str]:
    role = str(message.get("role", message.get("from")))
    known = FOREIGN_ROLES.get(role.lower(), role)
    if known != role:
        yield f"role `{role}` read as {known}"
    for key, value in message.items():
        if key in FLAGS:
            if known != "assistant" and value and FLAGS[key]:
                yield f"`{key}` of a turn that is no answer not used: answers alone are trained"
        elif key not in columns.MESSAGE_KEYS and not is_empty(value):
            yield f"messages' key `{key}` not used"
