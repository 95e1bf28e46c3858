"""A transcript of Human and Assistant in one text, as HH-RLHF writes them -> chat messages."""

from __future__ import annotations

import re

from prefloop.errors import UserError, located
from prefloop.records import Message

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
NAMES = rf"({'|'.join(ROLES)}):"
APART = re.compile(rf"(?:\r?\n){{2,}}{NAMES}")
ON_LINES = re.compile(rf"\r?\n{NAMES}")  # of transcripts that have no empty lines between turns
BEGINS = re.compile(rf"\s*{NAMES}")
WAITS = re.compile(r"\nAssistant:\s*$")


def is_transcript(text: str) -> bool:
    r"""Whether a prompt is turns: it begins with one, and others follow or an empty line precedes.

    >>> [is_transcript(t) for t in ("\n\nHuman: Hi", "Human: Hi\n\nAssistant:", "Human: an ape")]
    [True, True, False]
    """
    begins = BEGINS.match(text) is not None
    return begins and (text.startswith("\n\n") or "\nAssistant:" in text)


def asked(prompt: str, where: str) -> tuple[Message, ...]:
    """A prompt's messages: a transcript's turns, without the one that waits for the answer, or the
    user's message. UserError for a transcript that leaves open who says what.
    """
    if not is_transcript(prompt):
        if WAITS.search(prompt) and APART.search(prompt):
            raise UserError(
                f'{located(where)}`prompt` is a transcript with a text before its first "Human:"; '
                'begin it with "System:", or give messages'
            )
        return (Message("user", prompt),)
    text = "\n\n" + prompt.strip()
    apart = ON_LINES if not APART.search(text, 2) and ON_LINES.search(text, 2) else APART
    marks = [*APART.finditer(text, 0, 2 + len("Assistant:")), *apart.finditer(text, 2)]
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    turns = [
        Message(ROLES[mark[1]], text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]
    if turns[-1] == Message("assistant", ""):
        turns.pop()
    if not turns or turns[-1].role == "assistant":
        raise UserError(
            f"{located(where)}`prompt` is a transcript that ends in an answer's midst; end it with "
            'the "Human:" turn, or with "Assistant:" and nothing after it'
        )
    return tuple(turns)


def said(answer: str, where: str) -> tuple[Message, ...]:
    """The assistant's message of an answer to a transcript; UserError where more turns follow."""
    if APART.search(answer):
        raise UserError(
            f"{located(where)}an answer to a transcript goes on with other turns; cut it, or give "
            "messages"
        )
    return (Message("assistant", answer.strip()),)
