"""Outside data sets -> records: TRL's columns, chat messages, HH transcripts, rankings.

| kind | rows accepted |
|---|---|
| demonstration | `prompt`, `completion`; or `messages` |
| preference | `chosen`, `rejected`, `prompt` or an implicit one; `prompt`, `completions`, `tiers` |
| unpaired | `prompt`, `completion`, `label`; or a preference between two, which becomes two rows |
| prompt | `prompt`; or `chosen`, `rejected` |

Texts are strings or message lists; next to a message list, a string prompt is the user's message
(a transcript its turns) and a string answer the assistant's. An implicit prompt is what both
answers begin with: up to the last "Assistant:" of an HH transcript, or the common first messages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from prefloop.data import transcripts
from prefloop.data.columns import CHATS, HEADS, check_columns, form_of
from prefloop.data.messages import decoded, head, notes, text, with_head
from prefloop.data.messages import messages as messages_of
from prefloop.data.sampled import samples, samples_of_list
from prefloop.errors import UserError
from prefloop.records import (
    Comparison,
    Conversation,
    Demonstration,
    Message,
    Prompt,
    Ranking,
    Record,
    RowCounts,
    Sampled,
    Text,
    Unpaired,
)
from prefloop.tables import rows_of

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


def load(source: str, kind: Kind, counts: RowCounts, chat: bool = False) -> list[Any]:
    """Read a file, a `datasets` folder or a hub id into records of one kind.

    A row that is not of that kind is a UserError, or dropped, as `counts` says; it is one in any
    case where there are no rows. Pairs that differ before the last answer, and HH transcripts with
    an empty one, are dropped and counted. `chat` takes strings for the user's and the
    assistant's messages.
    """
    require_kind(kind)
    records: list[Record] = []

    def bad(where: str, error: UserError) -> None:
        counts.read += 1
        counts.bad_row(where, error)

    for where, row in rows_of(source, bad):
        try:
            parsed = parse_row(row, where, kind, chat)
        except UserError as error:
            bad(where, error)
            continue
        counts.read += max(1, len(parsed))
        for note in notes(row, kind):
            counts.note(note)
        records += [item for item in parsed if not isinstance(item, str)]
        for item in parsed:
            if isinstance(item, Conversation) and item.messages[-1].role != "assistant":
                counts.note("turns after the last answer not used")
        for reason in parsed:
            if isinstance(reason, str):
                counts.drop(reason)
    if not records:
        why = counts.summary() if counts.dropped else "it holds no rows"
        raise UserError(f"{source}: nothing to use: {why}; give rows of {ACCEPTED[kind]}")
    return records


def require_kind(kind: str) -> None:
    """UserError for rows of a kind that there is not."""
    if kind not in ACCEPTED:
        raise UserError(f"no kind {kind!r} of rows; give one of {', '.join(ACCEPTED)}")


def parse_row(row: Row, where: str, kind: Kind, chat: bool = False) -> Sequence[Record | str]:
    """The records of one row; a string is the reason why the row gives none."""
    check_columns(row, kind, where)
    before = head(row, where)
    parsed = _parsed(row, where, kind)
    if chat:
        parsed = [item if isinstance(item, str) else as_chat(item) for item in parsed]
    return [_placed(item, before, where) for item in parsed] if before else parsed


def _placed(item: Record | str, before: tuple[Message, ...], where: str) -> Record | str:
    if isinstance(item, str):
        return item
    name = "messages" if isinstance(item, Conversation) else "prompt"
    changed: dict[str, Any] = {name: with_head(getattr(item, name), before, where)}
    return replace(item, **changed)


def as_chat(record: AnyRecord) -> AnyRecord:
    """The record with strings as the user's and the assistant's messages, transcripts as turns.

    UserError for a transcript that cannot be told apart.
    """
    if isinstance(record, Conversation) or not isinstance(record.prompt, str):
        return record
    prompt, where = record.prompt, record.where
    turns = transcripts.is_transcript(prompt)

    def answer(text: Text) -> Text:
        assert isinstance(text, str)
        return transcripts.said(text, where) if turns else (Message("assistant", text),)

    changed: dict[str, Any] = {"prompt": transcripts.asked(prompt, where)}
    if isinstance(record, Ranking):
        changed["completions"] = tuple(map(answer, record.completions))
    elif isinstance(record, Comparison):
        changed |= {name: answer(getattr(record, name)) for name in ("chosen", "rejected")}
    elif not isinstance(record, Prompt):
        changed["completion"] = answer(record.completion)
    if turns and not isinstance(record, Prompt):  # stripped texts are not those of the tokens
        changed["sampled"] = tuple(Sampled(one.ended) for one in record.sampled)
    return replace(record, **changed)


def _parsed(row: Row, where: str, kind: Kind) -> Sequence[Record | str]:
    form = form_of(row, kind)
    if form and form[0] in CHATS:
        return [_conversation(row[form[0]], form[0], where)]
    if "tiers" in form:
        return [replace(_ranking(row, where), margin=_margin(row, where))]
    if form == ("prompt",):
        return [_prompt(row, where)]
    if "completion" in form:
        prompt, answer = _prompt_and_answers(row, where, "completion")
        if kind == "demonstration":
            return [Demonstration(prompt, answer, where, samples(row, where, "completion"))]
        label = _label(row["label"], where)
        return [Unpaired(prompt, answer, label, where, samples(row, where, "completion"))]
    if "chosen" in form:
        pair = _pair(row, where)
        if isinstance(pair, str):
            return [pair]
        pair = replace(pair, sampled=samples(row, where, "chosen", "rejected"))
        if kind == "preference":
            return [replace(pair, margin=_margin(row, where)).as_ranking()]
        if kind == "prompt":
            gone = ("prompt", "chosen", "rejected", *HEADS)
            extra = {key: row[key] for key in row if key not in gone}
            return [Prompt(pair.prompt, where, extra)]
        if _margin(row, where):
            raise UserError(f"{where}: `margin` is of a pair, and --loss kto reads none; remove it")
        answers = ((pair.chosen, True), (pair.rejected, False))
        return [
            Unpaired(pair.prompt, answer, label, where, pair.sampled[place : place + 1])
            for place, (answer, label) in enumerate(answers)
        ]
    names = [f"`{name}`" + (" (null)" if row[name] is None else "") for name in row]
    columns = ", ".join(names) or "none"
    raise UserError(f"{where}: columns {columns}; {kind} rows need {ACCEPTED[kind]}")


# --- one row of each form ------------------------------------------------------------------------


def _prompt(row: Row, where: str) -> Prompt:
    prompt = text(row["prompt"], "prompt", where)
    _check_asked(prompt, where)
    return Prompt(prompt, where, {k: row[k] for k in row if k != "prompt" and k not in HEADS})


def _conversation(value: object, name: str, where: str) -> Conversation:
    messages = messages_of(decoded(value, name, where), name, where)
    roles = [message.role for message in messages]
    if roles[0] == "assistant" or "assistant" not in roles:
        raise UserError(
            f"{where}: `{name}` has the roles {', '.join(roles)}; it must begin with another "
            "role than the assistant's and hold an assistant message"
        )
    for number, message in enumerate(messages):
        if message.role == "assistant" and not message.content.strip():
            raise UserError(f"{where}: `{name}[{number}]` is an empty answer; remove or fill it")
    if not any(message.trained for message in messages if message.role == "assistant"):
        raise UserError(f"{where}: no answer of `{name}` is trained, by its flags; remove the row")
    return Conversation(messages, where)


def _ranking(row: Row, where: str) -> Ranking:
    """Empty completions may stand here: a policy's samples are ranked as they are."""
    completions = decoded(row["completions"], "completions", where)
    tiers = decoded(row["tiers"], "tiers", where)
    if not isinstance(completions, list) or not completions:
        raise UserError(f"{where}: `completions` must be a list of answers, and not empty")
    if not isinstance(tiers, list) or not all(
        isinstance(tier, list) and all(type(index) is int for index in tier) for tier in tiers
    ):
        raise UserError(
            f"{where}: `tiers` must be lists of completion numbers, best first, as [[1], [3, 0]]"
        )
    names = [f"completions[{number}]" for number in range(len(completions))]
    texts = [text(row["prompt"], "prompt", where)]
    texts += [text(value, name, where) for value, name in zip(completions, names, strict=True)]
    prompt, *answers = _same_form(texts, ["prompt", *names], where)
    return Ranking(
        prompt,
        tuple(answers),
        tuple(tuple(tier) for tier in tiers),
        where,
        sampled=samples_of_list(row, where, len(answers)),
    )


def _pair(row: Row, where: str) -> Comparison | str:
    """A comparison, or why an HH transcript gives none."""
    chosen, rejected = (text(row[name], name, where) for name in ("chosen", "rejected"))
    if row.get("prompt") is not None and not _says_the_prompt(row, chosen, rejected, where):
        prompt, chosen, rejected = _prompt_and_answers(row, where, "chosen", "rejected")
        return Comparison(prompt, chosen, rejected, where)
    if isinstance(chosen, str) and isinstance(rejected, str):
        differs = (at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        shared = next(differs, min(len(chosen), len(rejected)))
        cut = chosen.rfind(transcripts.ASSISTANT, 0, shared)
        if cut < 0:
            raise UserError(
                f'{where}: no `prompt`, and `chosen` and `rejected` do not share a "Human: ... '
                'Assistant:" beginning; add a `prompt` column'
            )
        cut += len(transcripts.ASSISTANT)
        pair = Comparison(chosen[:cut], chosen[cut:], rejected[cut:], where)
        answers = chosen[cut:] + rejected[cut:]
        if transcripts.HUMAN in answers or transcripts.ASSISTANT in answers:
            return "transcripts that differ before the last answer"
        if not chosen[cut:].strip() or not rejected[cut:].strip():
            return "transcript with an empty answer"
        return pair
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError(f"{where}: `chosen` and `rejected` must both be strings or message lists")
    length = _shared(chosen, rejected)
    if not length:
        raise UserError(
            f"{where}: no `prompt`, and `chosen` and `rejected` do not begin with the same "
            "messages; add a `prompt` column"
        )
    if max(len(chosen), len(rejected)) > length + 1 and (
        chosen[-1].role == rejected[-1].role == "assistant"
    ):
        return "conversations that differ before the last answer"
    _check_asked(chosen[:length], where)
    better = _one_answer(chosen[length:], "chosen", where)
    worse = _one_answer(rejected[length:], "rejected", where)
    if not better[0].content.strip() or not worse[0].content.strip():
        return "conversation with an empty answer"
    return Comparison(chosen[:length], better, worse, where)


def _shared(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """Messages that both begin with, the last one of each left aside."""
    length = min(len(chosen), len(rejected)) - 1
    while chosen[:length] != rejected[:length]:
        length -= 1
    return length


def _says_the_prompt(row: Row, chosen: Text, rejected: Text, where: str) -> bool:
    """Whether the answers are whole conversations in which the prompt stands once more."""
    prompt = text(row["prompt"], "prompt", where)
    if isinstance(chosen, str) or isinstance(rejected, str):
        both = all(str(side).startswith(str(prompt)) for side in (chosen, rejected))
        return isinstance(prompt, str) and prompt.endswith(transcripts.ASSISTANT) and both
    if min(len(chosen), len(rejected)) < 2:
        return False
    chat = transcripts.asked(prompt, where) if isinstance(prompt, str) else prompt
    before = [{(m.role, m.content.strip()) for m in side[:-1]} for side in (chosen, rejected)]
    return all((m.role, m.content.strip()) in side for m in chat for side in before)


def _prompt_and_answers(row: Row, where: str, *names: str) -> list[Text]:
    """Prompt and answers, all strings or all messages; an empty one must have been sampled."""
    texts = [text(row[name], name, where) for name in ("prompt", *names)]
    texts = _same_form(texts, ["prompt", *names], where)
    for name, said in zip(names, texts[1:], strict=True):
        sampled = any(row.get(f"{name}_{of}") is not None for of in ("finish_reason", "ids"))
        if not sampled and not (said if isinstance(said, str) else said[0].content).strip():
            raise UserError(f"{where}: `{name}` is an empty answer; remove the row or fill it")
    return texts


def _same_form(texts: Sequence[Text], names: Sequence[str], where: str) -> list[Text]:
    """A prompt and its answers in one form: where one of them is chat messages, all are."""
    prompt, *answers = texts
    if all(isinstance(text, str) for text in texts):
        return list(texts)
    chat = transcripts.asked(prompt, where) if isinstance(prompt, str) else prompt
    _check_asked(chat, where)
    formed: list[Text] = [chat]
    for name, answer in zip(names[1:], answers, strict=True):
        if isinstance(answer, str):
            formed.append((Message("assistant", answer),))
        else:  # some data sets repeat the prompt before the answer
            repeats = len(chat) if answer[: len(chat)] == chat else 0
            formed.append(_one_answer(answer[repeats:], name, where))
    return formed


def _one_answer(messages: tuple[Message, ...], name: str, where: str) -> tuple[Message, ...]:
    if [message.role for message in messages] != ["assistant"]:
        roles = ", ".join(message.role for message in messages) or "nothing"
        raise UserError(
            f"{where}: `{name}` must be one assistant message after the prompt, and it is {roles}; "
            "move earlier turns into `prompt`"
        )
    if not messages[0].trained:
        raise UserError(f"{where}: a flag keeps `{name}` out of the loss; remove the row or it")
    return messages


def _check_asked(prompt: Text, where: str) -> None:
    if not isinstance(prompt, str) and prompt[-1].role == "assistant":
        raise UserError(f"{where}: `prompt` ends with an assistant message; end it with the user's")


# --- values --------------------------------------------------------------------------------------


def _label(value: object, where: str) -> bool:
    labels = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    label = labels.get(str(value).strip().lower())
    if label is None:
        raise UserError(f"{where}: `label` is {value!r}; it must be true or false")
    return label


def _margin(row: Row, where: str) -> float:
    """By how much a better answer should outscore a worse one; 0 without the column."""
    value = row.get("margin")
    try:
        margin = 0.0 if value in (None, "") else float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if isinstance(value, bool) or not math.isfinite(margin):
        raise UserError(f"{where}: `margin` is {value!r}; it must be a finite number")
    return margin
