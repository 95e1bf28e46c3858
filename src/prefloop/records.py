"""What people and files say, before any tokenizer: prompts, demonstrations, rankings. No torch.

A text is a plain string or a tuple of chat messages. Every record remembers `where` it was read
(`file:line`), so that whatever is found wrong later can still name the line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from prefloop.errors import TooLong, UserError, located
from prefloop.terminal import shown


@dataclass(frozen=True)
class Message:
    """One turn of a chat; a first one of role "tools" holds the chat's tools as JSON."""

    role: str
    content: str
    trained: bool = field(default=True, compare=False)  # an assistant's turn may be kept out


Text = str | tuple[Message, ...]


@dataclass(frozen=True)
class Sampled:
    """What is known of an answer that a model wrote, beside its text."""

    ended: bool | None = None  # False: cut at the length limit; None: not known, read as ended
    ids: tuple[int, ...] = ()  # its tokens, the stop token included; empty: not known
    tokenizer: str = ""  # whose tokens they are (Encoder.fingerprint)

    @property
    def cut(self) -> bool:
        """Whether it is known that no stop token ends the answer."""
        return self.ended is False

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length`, or None where nobody said."""
        return None if self.ended is None else "stop" if self.ended else "length"


@dataclass(frozen=True)
class Prompt:
    """Something to be answered; `extra` carries the row's other columns along."""

    prompt: Text
    where: str = field(default="", compare=False)
    extra: Mapping[str, object] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Demonstration:
    """A prompt with an answer to imitate."""

    prompt: Text
    completion: Text
    where: str = field(default="", compare=False)
    sampled: tuple[Sampled, ...] = field(default=(), compare=False)  # of the completion


@dataclass(frozen=True)
class Conversation:
    """A chat whose assistant turns are all to be imitated."""

    messages: tuple[Message, ...]
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Ranking:
    """Answers to one prompt in a weak order: `tiers` holds their indices, best first.

    >>> Ranking("p", ("a", "b", "c"), ((1,), (2, 0))).pairs()
    [(1, 2), (1, 0)]
    """

    prompt: Text
    completions: tuple[Text, ...]
    tiers: tuple[tuple[int, ...], ...]
    where: str = field(default="", compare=False)
    margin: float = 0.0  # by which a reward model should score a better answer higher
    sampled: tuple[Sampled, ...] = field(default=(), compare=False)  # one an answer, or none

    def __post_init__(self) -> None:
        ranked = sorted(index for tier in self.tiers for index in tier)
        if ranked != list(range(len(self.completions))) or not all(self.tiers):
            raise UserError(
                f"{located(self.where)}`tiers` {[list(tier) for tier in self.tiers]} must name "
                f"each of the {len(self.completions)} completions once, as 0 to "
                f"{len(self.completions) - 1}, with no empty tier"
            )

    def pairs(self) -> list[tuple[int, int]]:
        """Strictly ordered pairs (winner, loser) of indices into `completions`."""
        ordered = combinations(self.tiers, 2)
        return [(winner, loser) for above, below in ordered for winner in above for loser in below]

    def tied_pairs(self) -> int:
        """Pairs that stand in the same tier."""
        return sum(len(tier) * (len(tier) - 1) // 2 for tier in self.tiers)


@dataclass(frozen=True)
class Comparison:
    """Two different answers to one prompt, the better and the worse."""

    prompt: Text
    chosen: Text
    rejected: Text
    where: str = field(default="", compare=False)
    margin: float = 0.0
    sampled: tuple[Sampled, ...] = field(default=(), compare=False)  # of chosen and rejected

    def __post_init__(self) -> None:
        if self.chosen == self.rejected:
            raise UserError(
                f"{located(self.where)}`chosen` and `rejected` are equal, so nothing is preferred; "
                "remove the row or mend it"
            )

    def as_ranking(self) -> Ranking:
        """The same preference as a ranking of two."""
        answers = (self.chosen, self.rejected)
        tiers = ((0,), (1,))
        return Ranking(self.prompt, answers, tiers, self.where, self.margin, self.sampled)


@dataclass(frozen=True)
class Unpaired:
    """One answer judged desirable (`label` true) or undesirable on its own."""

    prompt: Text
    completion: Text
    label: bool
    where: str = field(default="", compare=False)
    sampled: tuple[Sampled, ...] = field(default=(), compare=False)  # of the completion


Record = Prompt | Demonstration | Conversation | Comparison | Ranking | Unpaired


@dataclass
class RowCounts:
    """How many rows were read, used, cut and dropped, and why; nothing goes missing silently.

    A pair that is read as two unpaired answers counts as two rows.
    """

    read: int = 0
    used: int = 0
    truncated: int = 0
    tied_pairs: int = 0  # of answers in used rankings: they carry no order
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)  # what was read otherwise, or not used
    bad_rows: Literal["error", "drop", "list"] = "error"  # list: drop those too long as well
    bad: list[tuple[str, str]] = field(default_factory=list)  # where, and what is wrong

    def note(self, what: str) -> None:
        """Count something about a row that its owner should know."""
        self.noted[what] = self.noted.get(what, 0) + 1

    def drop(self, reason: str) -> None:
        """Count one row that will not be used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def bad_row(self, where: str, error: UserError) -> None:
        """Raise what is wrong with a row, or drop the row, as `bad_rows` says.

        Rows that are only too long are `--truncation`'s.
        """
        problem = str(error).removeprefix(located(where))
        if self.bad_rows == "error" or (self.bad_rows == "drop" and isinstance(error, TooLong)):
            raise type(error)(located(where) + problem) from error
        self.bad.append((where, problem))
        self.drop(f"bad row: {_reason(problem)}")

    def as_dict(self) -> dict[str, object]:
        """For `run.json`."""
        names = ("read", "used", "truncated", "tied_pairs")
        kinds = {"dropped": dict(self.dropped), "noted": dict(self.noted)}
        return {**{name: getattr(self, name) for name in names}, **kinds}

    def summary(self) -> str:
        """One line for people.

        >>> RowCounts(10, 8, 1, 3, {"too long": 2}).summary()
        'read 10 rows, used 8 (1 truncated, 3 tied pairs), dropped 2 (too long)'
        """
        line = f"read {self.read} rows, used {self.used}"
        details = [f"{self.truncated} truncated"] if self.truncated else []
        details += [f"{self.tied_pairs} tied pairs"] if self.tied_pairs else []
        line += f" ({', '.join(details)})" if details else ""
        parts = [f"{count} ({reason})" for reason, count in self.dropped.items()]
        line += f", dropped {', '.join(parts)}" if parts else ""
        roles = [f"{what} ({count})" for what, count in self.noted.items() if "role" in what]
        return shown("; ".join([line, *roles]))  # reasons name columns and roles


def _reason(problem: str) -> str:
    """What is wrong without the remedy and without what differs from row to row.

    >>> _reason("`messages[3]` is an empty answer; remove or fill it")
    '`messages[N]` is an empty answer'
    """
    problem = re.sub(r"^token .* \(\d+\)", "token", problem)  # a token may hold anything
    problem = re.sub(r"\([^()]*\)|\[\[.*\]\]|'[^']*'", "...", problem.partition("; ")[0])
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "N", problem)


# --- records as JSON -----------------------------------------------------------------------------


def text_to_json(text: Text) -> object:
    """A string as it is; messages as TRL's list of objects, without the chat's tools."""
    if isinstance(text, str):
        return text
    return [
        {"role": message.role, "content": message.content}
        | ({} if message.trained else {"train": False})
        for message in text
        if message.role != "tools"
    ]


def tools_of(text: Text) -> list[dict[str, object]] | None:
    """The tools that a chat begins with."""
    if isinstance(text, str) or not text or text[0].role != "tools":
        return None
    tools: list[dict[str, object]] = json.loads(text[0].content)
    return tools


def ranking_to_json(ranking: Ranking) -> dict[str, object]:
    """`prompt`, `completions` and `tiers`, and what is known of sampled answers."""
    return {
        "prompt": text_to_json(ranking.prompt),
        "completions": [text_to_json(completion) for completion in ranking.completions],
        "tiers": [list(tier) for tier in ranking.tiers],
    } | sampled_to_json(ranking.sampled, ("finish_reasons", "completion_ids"))


def sampled_to_json(sampled: Sequence[Sampled], names: tuple[str, str]) -> dict[str, object]:
    """Finish reasons, and token ids with their tokenizer, under these two names."""
    row: dict[str, object] = {}
    reasons = [one.finish_reason for one in sampled]
    if any(reasons):
        row[names[0]] = reasons
    if whose := next((one.tokenizer for one in sampled if one.ids), ""):
        row |= {names[1]: [list(one.ids) or None for one in sampled], "tokenizer": whose}
    return row


def pair_to_json(sampled: Sequence[Sampled], names: Sequence[str]) -> dict[str, object]:
    """The same of single answers: `NAME_finish_reason` and `NAME_ids` of each name."""
    row: dict[str, object] = {}
    for name, one in zip(names, sampled, strict=bool(sampled)):
        if one.finish_reason:
            row[f"{name}_finish_reason"] = one.finish_reason
        if one.ids:
            row |= {f"{name}_ids": list(one.ids), "tokenizer": one.tokenizer}
    return row


def to_json(record: Record) -> dict[str, object]:
    """The row, with TRL's column names, that reads back as this record."""
    tools = tools_of(record.messages if isinstance(record, Conversation) else record.prompt)
    return _columns(record) | ({"tools": tools} if tools else {})


def _columns(record: Record) -> dict[str, object]:
    if isinstance(record, Conversation):
        return {"messages": text_to_json(record.messages)}
    if isinstance(record, Ranking):
        margin = {"margin": record.margin} if record.margin else {}
        return ranking_to_json(record) | margin
    row: dict[str, object] = {"prompt": text_to_json(record.prompt)}
    if isinstance(record, Prompt):
        row.update(record.extra)
    elif isinstance(record, Comparison):
        row |= {"chosen": text_to_json(record.chosen), "rejected": text_to_json(record.rejected)}
        row |= {"margin": record.margin} if record.margin else {}
        row |= pair_to_json(record.sampled, ("chosen", "rejected"))
    else:
        row["completion"] = text_to_json(record.completion)
        if isinstance(record, Unpaired):
            row["label"] = record.label
        row |= pair_to_json(record.sampled, ("completion",))
    return row
