"""Outside data sets -> records: TRL's columns, chat messages, HH transcripts, rankings.

| kind | rows accepted |
|---|---|
| demonstration | `prompt`, `completion`; or `messages` |
| preference | `chosen`, `rejected`, `prompt` or an implicit one; `prompt`, `completions`, `tiers` |
| unpaired | `prompt`, `completion`, `label`; or a preference between two, which becomes two rows |
| prompt | `prompt`; or `chosen`, `rejected` |

Texts are strings or message lists; next to a message list, a string prompt is the user's message
and a string answer the assistant's. An implicit prompt is what both answers begin with: up to the
last "Assistant:" of an HH transcript, or the common first messages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from prefloop.errors import UserError, first_line
from prefloop.files import SUFFIXES, json_type, read_rows
from prefloop.records import (
    Comparison,
    Conversation,
    Demonstration,
    Message,
    Prompt,
    Ranking,
    Record,
    RowCounts,
    Text,
    Unpaired,
    text_to_json,
)

Kind = Literal["demonstration", "preference", "unpaired", "prompt"]
Row = Mapping[str, Any]
AnyRecord = TypeVar("AnyRecord", bound=Record)

PAIR = "`chosen`+`rejected` (with `prompt`, or transcripts that share one)"
ACCEPTED: dict[Kind, str] = {
    "demonstration": "`prompt`+`completion`, or `messages`",
    "preference": f"{PAIR}, or `prompt`+`completions`+`tiers`",
    "unpaired": f"`prompt`+`completion`+`label`, or {PAIR}",
    "prompt": f"`prompt`, or {PAIR}",
}
HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# What a message may hold beside role and content, and what would be lost by reading those only.
ROLES = ("system", "developer", "user", "assistant", "tool")
UNREAD = ("tool_calls", "function_call", "reasoning_content", "thinking")


@overload
def load(
    source: str, kind: Literal["demonstration"], counts: RowCounts
) -> list[Demonstration | Conversation]: ...
@overload
def load(source: str, kind: Literal["preference"], counts: RowCounts) -> list[Ranking]: ...
@overload
def load(source: str, kind: Literal["unpaired"], counts: RowCounts) -> list[Unpaired]: ...
@overload
def load(source: str, kind: Literal["prompt"], counts: RowCounts) -> list[Prompt]: ...
def load(source: str, kind: Kind, counts: RowCounts) -> list[Any]:
    """Read a file, a `datasets` folder or a hub id into records of one kind.

    Raises UserError at the first row that is not of that kind, and where there are no rows. Only
    HH transcripts with an empty or missing common answer are dropped, and counted.
    """
    records: list[Record] = []
    for where, row in _rows(source):
        found = parse_row(row, where, kind)
        counts.read += max(1, len(found))
        records += [item for item in found if not isinstance(item, str)]
        for reason in found:
            if isinstance(reason, str):
                counts.drop(reason)
    if not records:
        why = counts.summary() if counts.dropped else "it holds no rows"
        raise UserError(f"{source}: nothing to use: {why}; give rows of {ACCEPTED[kind]}")
    return records


def parse_row(row: Row, where: str, kind: Kind) -> Sequence[Record | str]:
    """The records of one row; a string is the reason why the row gives none."""
    if kind == "demonstration" and _has(row, "messages"):
        return [_conversation(row, where)]
    if kind == "preference" and _has(row, "prompt", "completions", "tiers"):
        return [_ranking(row, where)]
    if kind == "prompt" and _has(row, "prompt"):
        return [_prompt(row, where)]
    if kind == "demonstration" and _has(row, "prompt", "completion"):
        prompt, answer = _prompt_and_answers(row, where, "completion")
        return [Demonstration(prompt, answer, where)]
    if kind == "unpaired" and _has(row, "prompt", "completion", "label"):
        prompt, answer = _prompt_and_answers(row, where, "completion")
        return [Unpaired(prompt, answer, _label(row["label"], where), where)]
    if kind != "demonstration" and _has(row, "chosen", "rejected"):
        pair = _pair(row, where)
        if isinstance(pair, str):
            return [pair]
        if kind == "preference":
            return [replace(pair, margin=_margin(row, where)).as_ranking()]
        if kind == "prompt":
            extra = {key: row[key] for key in row if key not in ("chosen", "rejected")}
            return [Prompt(pair.prompt, where, extra)]
        answers = ((pair.chosen, True), (pair.rejected, False))
        return [Unpaired(pair.prompt, answer, label, where) for answer, label in answers]
    found = [f"`{name}`" + (" (null)" if row[name] is None else "") for name in row]
    columns = ", ".join(found) or "none"
    raise UserError(f"{where}: columns {columns}; {kind} rows need {ACCEPTED[kind]}")


def _has(row: Row, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


# --- one row of each form ------------------------------------------------------------------------


def _prompt(row: Row, where: str) -> Prompt:
    prompt = _text(row["prompt"], "prompt", where)
    if not isinstance(prompt, str) and prompt[-1].role == "assistant":
        raise UserError(f"{where}: `prompt` ends with an assistant message; end it with the user's")
    return Prompt(prompt, where, {key: row[key] for key in row if key != "prompt"})


def _conversation(row: Row, where: str) -> Conversation:
    messages = _messages(_decoded(row["messages"], "messages", where), "messages", where)
    roles = [message.role for message in messages]
    if roles[0] == "assistant" or "assistant" not in roles:
        raise UserError(
            f"{where}: `messages` has the roles {', '.join(roles)}; it must begin with another "
            "role than the assistant's and hold an assistant message"
        )
    for number, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            raise UserError(f"{where}: `messages[{number}]` is an empty answer; remove or fill it")
    return Conversation(messages, where)


def _ranking(row: Row, where: str) -> Ranking:
    """Empty completions may stand here: a policy's samples are ranked as they are."""
    completions = _decoded(row["completions"], "completions", where)
    tiers = _decoded(row["tiers"], "tiers", where)
    if not isinstance(completions, list) or not completions:
        raise UserError(f"{where}: `completions` must be a list of answers, and not empty")
    if not isinstance(tiers, list) or not all(
        isinstance(tier, list) and all(type(index) is int for index in tier) for tier in tiers
    ):
        raise UserError(
            f"{where}: `tiers` must be lists of completion numbers, best first, as [[1], [3, 0]]"
        )
    names = [f"completions[{number}]" for number in range(len(completions))]
    texts = [_text(row["prompt"], "prompt", where)]
    texts += [_text(value, name, where) for value, name in zip(completions, names, strict=True)]
    prompt, *answers = _same_form(texts, ["prompt", *names], where)
    return Ranking(prompt, tuple(answers), tuple(tuple(tier) for tier in tiers), where)


def _pair(row: Row, where: str) -> Comparison | str:
    """A comparison, or why an HH transcript gives none."""
    if _has(row, "prompt"):
        prompt, chosen, rejected = _prompt_and_answers(row, where, "chosen", "rejected")
        return Comparison(prompt, chosen, rejected, where)
    chosen, rejected = (_text(row[name], name, where) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        differs = (at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        shared = next(differs, min(len(chosen), len(rejected)))
        cut = chosen.rfind(HH_ASSISTANT, 0, shared)
        if cut < 0:
            raise UserError(
                f'{where}: no `prompt`, and `chosen` and `rejected` do not share a "Human: ... '
                'Assistant:" beginning; add a `prompt` column'
            )
        cut += len(HH_ASSISTANT)
        pair = Comparison(chosen[:cut], chosen[cut:], rejected[cut:], where)
        answers = chosen[cut:] + rejected[cut:]
        if HH_HUMAN in answers or HH_ASSISTANT in answers:
            return "transcripts that differ before the last answer"
        if not chosen[cut:].strip() or not rejected[cut:].strip():
            return "transcript with an empty answer"
        return pair
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError(f"{where}: `chosen` and `rejected` must both be strings or message lists")
    length = min(len(chosen), len(rejected)) - 1
    while chosen[:length] != rejected[:length]:
        length -= 1
    if not length:
        raise UserError(
            f"{where}: no `prompt`, and `chosen` and `rejected` do not begin with the same "
            "messages; add a `prompt` column"
        )
    better = _one_answer(chosen[length:], "chosen", where)
    worse = _one_answer(rejected[length:], "rejected", where)
    return Comparison(chosen[:length], better, worse, where)


def _prompt_and_answers(row: Row, where: str, *names: str) -> list[Text]:
    """Prompt and non-empty answers, all strings or all messages."""
    texts = [_text(row[name], name, where) for name in ("prompt", *names)]
    texts = _same_form(texts, ["prompt", *names], where)
    for name, text in zip(names, texts[1:], strict=True):
        if not (text if isinstance(text, str) else text[0].content).strip():
            raise UserError(f"{where}: `{name}` is an empty answer; remove the row or fill it")
    return texts


def _same_form(texts: Sequence[Text], names: Sequence[str], where: str) -> list[Text]:
    """A prompt and its answers in one form: where one of them is chat messages, all are."""
    prompt, *answers = texts
    if all(isinstance(text, str) for text in texts):
        return list(texts)
    chat = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    if chat[-1].role == "assistant":
        raise UserError(f"{where}: `prompt` ends with an assistant message; end it with the user's")
    formed: list[Text] = [chat]
    for name, answer in zip(names[1:], answers, strict=True):
        if isinstance(answer, str):
            formed.append((Message("assistant", answer),))
        else:  # some data sets repeat the prompt before the answer
            repeats = len(chat) if answer[: len(chat)] == chat else 0
            formed.append(_one_answer(answer[repeats:], name, where))
    return formed


def _one_answer(messages: tuple[Message, ...], name: str, where: str) -> Text:
    if [message.role for message in messages] != ["assistant"]:
        roles = ", ".join(message.role for message in messages) or "nothing"
        raise UserError(
            f"{where}: `{name}` must be one assistant message after the prompt, and it is {roles}; "
            "move earlier turns into `prompt`"
        )
    return messages


# --- values --------------------------------------------------------------------------------------


def _text(value: object, name: str, where: str) -> Text:
    if isinstance(value, str) and value.startswith('[{"role"') and ".csv:" in where:
        value = _decoded(value, name, where)
    if isinstance(value, list):
        return _messages(value, name, where)
    return _string(value, name, where, "a string or a list of messages")


def _string(value: object, name: str, where: str, wanted: str = "a string") -> str:
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


def _messages(value: object, name: str, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `{name}` must be a list of messages, and not empty")
    messages = []
    for number, item in enumerate(value):
        field = f"{name}[{number}]"
        if not isinstance(item, dict) or not _has(item, "role", "content"):
            keys = ", ".join(item) if isinstance(item, dict) else f"a {json_type(item)}"
            raise UserError(f"{where}: `{field}` is {keys}; a message needs `role` and `content`")
        unread = [key for key in UNREAD if item.get(key)]
        if unread:
            raise UserError(
                f"{where}: `{field}.{unread[0]}` cannot be learned from; put it into `content` or "
                "remove it"
            )
        role, content = (_string(item[key], f"{field}.{key}", where) for key in ("role", "content"))
        if role not in ROLES and (not role or get_close_matches(role, ROLES, cutoff=0.8)):
            raise UserError(f"{where}: `{field}.role` is {role!r}; did you mean one of {ROLES}?")
        messages.append(Message(role, content))
    return tuple(messages)


def _decoded(value: object, name: str, where: str) -> object:
    """A list that CSV can hold only as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise UserError(f"{where}: `{name}` must be a list (in CSV: as JSON)") from error


def _label(value: object, where: str) -> bool:
    labels = {"true": True, "1": True, "false": False, "0": False}
    label = labels.get(str(value).strip().lower())
    if label is None:
        raise UserError(f"{where}: `label` is {value!r}; it must be true or false")
    return label


def _margin(row: Row, where: str) -> float:
    """By how much `chosen` should outscore `rejected`; 0 without the column."""
    value = row.get("margin")
    try:
        margin = 0.0 if value in (None, "") else float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if isinstance(value, bool) or not math.isfinite(margin):
        raise UserError(f"{where}: `margin` is {value!r}; it must be a finite number")
    return margin


# --- sources -------------------------------------------------------------------------------------


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    path = Path(source)
    local = source.endswith(SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1
    if path.is_file() or (local and not path.is_dir()):
        yield from read_rows(source)
        return
    try:
        datasets: Any = import_module("datasets")
    except ImportError as error:
        what = "a folder" if path.is_dir() else "no file, so a hub id"
        raise UserError(
            f"{source}: {what}, which needs the datasets package; pip install datasets"
        ) from error
    try:
        saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        data = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except Exception as error:  # whatever the package, the network or the hub say
        told = first_line(error)
        raise UserError(f"{source}: datasets cannot load it ({told}); check the name") from error
    if isinstance(data, dict):
        splits = list(data)
        if "train" not in splits and len(splits) > 1:
            told = ", ".join(splits)
            raise UserError(f"{source}: splits {told}, and none is `train`; save one by itself")
        data = data["train" if "train" in splits else splits[0]]
    for number, row in enumerate(data, 1):
        yield f"{source}:{number}", row


# --- splitting -----------------------------------------------------------------------------------


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
    told = json.dumps([seed, text_to_json(prompt_of(record))])
    return blake2b(told.encode(), digest_size=16).digest()
