"""What people and files say, before any tokenizer: prompts, demonstrations, rankings. No torch.

A text is a plain string or a tuple of chat messages. Every record remembers `where` it was read
(`file:line`), so that whatever is found wrong later can still name the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import combinations

from prefloop.errors import UserError, located


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


Text = str | tuple[Message, ...]


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

    def __post_init__(self) -> None:
        if self.chosen == self.rejected:
            raise UserError(
                f"{located(self.where)}`chosen` and `rejected` are equal, so nothing is preferred; "
                "remove the row or mend it"
            )

    def as_ranking(self) -> Ranking:
        """The same preference as a ranking of two."""
        answers = (self.chosen, self.rejected)
        return Ranking(self.prompt, answers, ((0,), (1,)), self.where, self.margin)


@dataclass(frozen=True)
class Unpaired:
    """One answer judged desirable (`label` true) or undesirable on its own."""

    prompt: Text
    completion: Text
    label: bool
    where: str = field(default="", compare=False)


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

    def drop(self, reason: str) -> None:
        """Count one row that will not be used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def as_dict(self) -> dict[str, object]:
        """For `run.json`."""
        names = ("read", "used", "truncated", "tied_pairs")
        return {**{name: getattr(self, name) for name in names}, "dropped": dict(self.dropped)}

    def summary(self) -> str:
        """One line for people.

        >>> RowCounts(10, 8, 1, 3, {"too long": 2}).summary()
        'read 10 rows, used 8 (1 truncated, 3 tied pairs), dropped 2 (too long)'
        """
        line = f"read {self.read} rows, used {self.used}"
        told = [f"{self.truncated} truncated"] if self.truncated else []
        told += [f"{self.tied_pairs} tied pairs"] if self.tied_pairs else []
        line += f" ({', '.join(told)})" if told else ""
        parts = [f"{count} ({reason})" for reason, count in self.dropped.items()]
        return line + (f", dropped {', '.join(parts)}" if parts else "")


# --- records as JSON -----------------------------------------------------------------------------


def text_to_json(text: Text) -> object:
    """A string as it is; messages as TRL's list of objects."""
    if isinstance(text, str):
        return text
    return [{"role": message.role, "content": message.content} for message in text]


def ranking_to_json(ranking: Ranking) -> dict[str, object]:
    """`prompt`, `completions` and `tiers`."""
    return {
        "prompt": text_to_json(ranking.prompt),
        "completions": [text_to_json(completion) for completion in ranking.completions],
        "tiers": [list(tier) for tier in ranking.tiers],
    }


def to_json(record: Record) -> dict[str, object]:
    """The row, with TRL's column names, that reads back as this record."""
    if isinstance(record, Conversation):
        return {"messages": text_to_json(record.messages)}
    if isinstance(record, Ranking):
        return ranking_to_json(record)
    row: dict[str, object] = {"prompt": text_to_json(record.prompt)}
    if isinstance(record, Prompt):
        row.update(record.extra)
    elif isinstance(record, Comparison):
        row |= {"chosen": text_to_json(record.chosen), "rejected": text_to_json(record.rejected)}
        row |= {"margin": record.margin} if record.margin else {}
    else:
        row["completion"] = text_to_json(record.completion)
        if isinstance(record, Unpaired):
            row["label"] = record.label
    return row
