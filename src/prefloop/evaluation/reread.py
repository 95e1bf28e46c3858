"""A comparison as it was written to disk, read back for its page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from prefloop.errors import UserError
from prefloop.evaluation.answers import Row
from prefloop.evaluation.comparison import Comparison, RunRecord, parsed_line, read_run


def read_comparison(folder: Path) -> tuple[Comparison, list[Row]]:
    """What compare.json and answers.jsonl hold; curves come from the run directories, where those
    still stand.
    """
    numbers, answers = folder / "compare.json", folder / "answers.jsonl"
    try:
        written = json.loads(numbers.read_text(encoding="utf-8"))
        lines = answers.read_bytes().splitlines()
        found = from_json(Comparison, written)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: compare.json or answers.jsonl cannot be read ({type(error).__name__}: "
            f"{error}); run `prefloop compare` again"
        ) from error
    ways = tuple(
        replace(
            way,
            run=_with_curves(way.run),
            runs=tuple(replace(one, run=_with_curves(one.run)) for one in way.runs),
        )
        for way in found.ways
    )
    scorer = _with_curves(found.reward_run)
    rows: list[Row] = [parsed_line(line, f"{answers}:{n}") for n, line in enumerate(lines, start=1)]
    return replace(found, ways=ways, reward_run=scorer), rows


def _with_curves(run: RunRecord | None) -> RunRecord | None:
    """The run as it stands on disk, where it is the same one still."""
    again = read_run(Path(run.folder)) if run and run.folder else None
    return again if again and run and again.cpu_seconds == run.cpu_seconds else run


def from_json(kind: Any, value: Any) -> Any:
    """`value` as JSON gave it, as the dataclass or type that `dataclasses.asdict` took it from.

    A field that was not written has its default, or is empty where it is a mapping.
    """
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        known = [field.name for field in fields(kind) if field.name in value]
        given = {name: from_json(hints[name], value[name]) for name in known}
        empty: dict[str, Any] = {n: {} for n, hint in hints.items() if get_origin(hint) is Mapping}
        return cast(Any, kind)(**empty | given)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        fitting = [part for part in parts if part is not NoneType and _fits(part, value)]
        return None if value is None else from_json(fitting[0], value)
    if origin is tuple:
        whole = len(parts) == 2 and parts[1] is Ellipsis
        each = [parts[0]] * len(value) if whole else parts
        return tuple(from_json(part, one) for part, one in zip(each, value, strict=True))
    return value


def _fits(kind: Any, value: object) -> bool:
    """Whether a part of a union is what the value came from."""
    if is_dataclass(kind):
        return isinstance(value, dict)
    return not isinstance(value, dict) or get_origin(kind) is Mapping
