"""Whether settings are what they must be: each by itself, then together. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from prefloop.config.ranges import Form, OnlyWith, Range, Settings
from prefloop.config.resolve import _convert, flag
from prefloop.errors import UserError


def validate(config: Settings) -> None:
    """Check each setting by itself and against the others; UserError names the first bad one."""
    for problem in problems(config):
        raise UserError(problem)


def problems(config: Any) -> Iterator[str]:
    """One line for each setting, or rule across settings, that does not hold."""
    types, marks = get_type_hints(type(config)), get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        _convert(value, types[name], type(config).__name__, name)
        beside = get_args(marks[name])[1:] if hasattr(marks[name], "__metadata__") else ()
        for item in value if isinstance(value, tuple) else [value]:
            yield from _faults(name, item, beside)
        for mark in beside:
            if not isinstance(mark, OnlyWith) or value == field.default:
                continue
            now, other = getattr(config, mark.other), flag(mark.other)
            if not mark.values and not now:
                yield f"{flag(name)} is read only with {other}, which is {now}; leave it out"
            elif mark.values and now not in mark.values:
                yield (
                    f"{flag(name)} is read only with {other} {' or '.join(mark.values)}, and "
                    f"{other} is {now}; leave it out"
                )
    yield from config.problems()


def _faults(name: str, value: object, beside: tuple[object, ...]) -> Iterator[str]:
    """What is wrong with one value of a setting, by the marks that stand beside it."""
    if isinstance(value, str):
        if not value.strip():
            yield f"{flag(name)} is empty; give a value or leave it out"
        for mark in beside:
            if isinstance(mark, Form) and not re.fullmatch(mark.pattern, value):
                yield f"{flag(name)} is {value!r}; {mark.remedy}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{flag(name)} is {value}; give a finite number"
        for mark in beside:
            if isinstance(mark, Range) and not mark.holds(value):
                yield f"{flag(name)} is {value}; it must {mark.must}"
