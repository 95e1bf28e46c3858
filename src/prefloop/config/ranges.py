"""What stands beside a setting: its range, its form, the values of another that read it. No torch.

    lr: Annotated[float, Above(0)] = 1e-5

`config.checks.validate` asks each of them; rules across settings are `problems` of the class.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from prefloop.config.resolve import flag
from prefloop.errors import UserError


class Settings:
    """What every class of settings has: the rules that hold between its settings."""

    def problems(self) -> Iterator[str]:
        """One line for each rule that is broken: what is wrong and how to mend it."""
        yield from ()


class Range:
    """Which numbers a setting may be; `must` ends the sentence "it must"."""

    def __init__(self, must: str, holds: Callable[[float], bool]) -> None:
        self.must, self.holds = must, holds


class Above(Range):
    """Greater than `low`."""

    def __init__(self, low: float) -> None:
        super().__init__(f"be above {low:g}", lambda value: value > low)


class AtLeast(Range):
    """`low` or greater."""

    def __init__(self, low: float) -> None:
        super().__init__(f"be {low:g} or more", lambda value: value >= low)


class Within(Range):
    """From `low` to `high`, each of which is allowed or not."""

    def __init__(
        self, low: float, high: float, with_low: bool = True, with_high: bool = True
    ) -> None:
        left, right = "[" if with_low else "(", "]" if with_high else ")"
        super().__init__(
            f"be in {left}{low:g}, {high:g}{right}",
            lambda value: (
                low < value < high or (value == low and with_low) or (value == high and with_high)
            ),
        )


@dataclass(frozen=True)
class Form:
    """The whole text must match `pattern`; `remedy` says what to give."""

    pattern: str
    remedy: str


class OnlyWith:
    """Only these values of the setting `other` read this one (any but its default, where none are
    named): it must not be set in vain.
    """

    def __init__(self, other: str, *values: str) -> None:
        self.other, self.values = other, values


ANY = Range("be finite", math.isfinite)
SEEDS = Range("be 0 or more and below 2^63", lambda value: 0 <= value < 2**63)
Seed = Annotated[int, SEEDS]
Device = Annotated[str, Form(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", "give auto, cpu, cuda or cuda:N")]
DType = Literal["auto", "float32", "bfloat16"]
Weights = Literal["auto", "float32", "bfloat16", "nf4"]
TemplateArgs = Annotated[
    str, Form(r"(?s)\s*\{.*\}\s*", """give a JSON mapping, such as '{"enable_thinking": false}'""")
]
ALL_LINEAR = "all-linear"
"""The adapters' targets by default, as PEFT calls them."""
FUNCTION = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def template_arguments(text: str) -> dict[str, object]:
    """What --template-args says; UserError where it is not a JSON mapping."""
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise UserError(f"--template-args {text}: not JSON ({error}); mend it") from error
    assert isinstance(arguments, dict)  # by its form
    return arguments


def is_pattern(name: str) -> bool:
    """Whether layers are named by a regular expression of whole names, and not by their end."""
    return re.fullmatch(r"[\w.-]+", name) is None


def target_problems(targets: Sequence[str], saved: Sequence[str]) -> Iterator[str]:
    """What is wrong with the names of --lora-targets, before a model says which it has."""
    if not targets:
        yield "--lora-targets names no layer; give some, or leave it out"
    patterns = [name for name in targets if is_pattern(name)]
    if patterns and len(targets) > 1:
        yield f"--lora-targets {patterns[0]}: a regular expression stands alone; join them with |"
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"--lora-targets {pattern}: not a regular expression ({error}); mend it"
    for name in sorted(set(targets) & set(saved)):
        yield f"--lora-targets and --modules-to-save both name {name}; leave it out of one"


def no_room(answer: int, length: int) -> Iterator[str]:
    """The problem of answers that fill the whole length."""
    if answer >= length:
        room = f"--max-new-tokens {answer} leaves no room for a prompt in --max-length {length}"
        yield f"{room}; lower it or raise --max-length"


def is_function(source: str) -> bool:
    """Whether a judge is `module:function`, and no folder of that name."""
    named = re.fullmatch(FUNCTION, source) is not None and not is_endpoint(source)
    return named and not Path(source).exists()


def is_endpoint(source: str) -> bool:
    """Whether a judge is a language model behind an endpoint: `openai:MODEL@URL`."""
    return source.startswith("openai:")


def endpoint_parts(source: str) -> tuple[str, str]:
    """(model, URL) of `openai:MODEL@URL`; empty where it has another form.

    >>> endpoint_parts("openai:org/m@v2@http://127.0.0.1:8000/v1/")
    ('org/m@v2', 'http://127.0.0.1:8000/v1')
    """
    match = re.fullmatch(r"openai:(.+)@(https?://\S+?)/*", source)
    return (match[1], match[2]) if match else ("", "")


OF_MODELS = ("device", "dtype", "weights", "max_length", "micro_batch_tokens", "template_args")


def unread_by_functions(config: Settings, of: str, judges: Sequence[str]) -> Iterator[str]:
    """The problems of settings for models where no judge is one that is loaded here."""
    if not all(is_function(judge) or is_endpoint(judge) for judge in judges):
        return
    for field in fields(config):  # type: ignore[arg-type]
        unread = field.name in OF_MODELS
        if unread and getattr(config, field.name) != field.default:
            yield f"{flag(field.name)} is read by models, and no {of} is one; leave it out"
