"""What stands beside a setting: its range, its form, the values of another that read it. No torch.

    lr: Annotated[float, Above(0)] = 1e-5

`config.checks.validate` asks each of them; rules across settings are `problems` of the class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated


class Settings:
    """What every class of settings has: the rules that hold between its settings."""

    def problems(self) -> Iterator[str]:
        """One line for each rule that is broken: what is wrong and how to mend it."""
        yield from ()


class Range:
    """Which numbers a setting may be; all must be finite."""

    def must_be(self) -> str:
        """The range, as the end of a sentence."""
        return "be a finite number"

    def holds(self, value: float) -> bool:
        """Whether the value lies inside."""
        return math.isfinite(value)


@dataclass(frozen=True)
class Finite(Range):
    """Any number but infinity and nan."""


@dataclass(frozen=True)
class Above(Range):
    """Greater than `low`."""

    low: float

    def must_be(self) -> str:
        """See Range."""
        return f"be above {self.low:g}"

    def holds(self, value: float) -> bool:
        """See Range."""
        return value > self.low


@dataclass(frozen=True)
class AtLeast(Range):
    """`low` or greater."""

    low: float

    def must_be(self) -> str:
        """See Range."""
        return f"be {self.low:g} or more"

    def holds(self, value: float) -> bool:
        """See Range."""
        return value >= self.low


@dataclass(frozen=True)
class Within(Range):
    """From `low` to `high`, each itself allowed or not."""

    low: float
    high: float
    with_low: bool = True
    with_high: bool = True

    def must_be(self) -> str:
        """See Range."""
        left, right = "[" if self.with_low else "(", "]" if self.with_high else ")"
        return f"be in {left}{self.low:g}, {self.high:g}{right}"

    def holds(self, value: float) -> bool:
        """See Range."""
        above = self.low <= value if self.with_low else self.low < value
        return above and (value <= self.high if self.with_high else value < self.high)


@dataclass(frozen=True)
class SeedRange(Range):
    """What torch and numpy take as a seed."""

    def must_be(self) -> str:
        """See Range."""
        return "be 0 or more and below 2^63"

    def holds(self, value: float) -> bool:
        """See Range."""
        return 0 <= value < 2**63


@dataclass(frozen=True)
class Form:
    """The whole text must match `pattern`; `remedy` says what to give."""

    pattern: str
    remedy: str

    def holds(self, value: str) -> bool:
        """Whether the text has this form."""
        return re.fullmatch(self.pattern, value) is not None


class OnlyWith:
    """Only these values of the setting `other` read this one: it must not be set in vain."""

    def __init__(self, other: str, *values: str) -> None:
        self.other, self.values = other, values


Seed = Annotated[int, SeedRange()]
Device = Annotated[str, Form(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", "give auto, cpu, cuda or cuda:N")]
FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def no_room(max_new_tokens: int, max_length: int) -> str:
    """The problem of answers that fill the whole length."""
    return (
        f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in --max-length "
        f"{max_length}; lower it or raise --max-length"
    )
