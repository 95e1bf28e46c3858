"""From YAML and flags to a checked configuration: defaults < YAML < flags. Imports no torch."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from prefloop.config.kinds import in_words
from prefloop.errors import UserError

C = TypeVar("C")


class OrAuto:
    """Stands beside a number for which the word `auto` may be given, too; it is kept as 0."""


def flag(name: str) -> str:
    """The flag of a field: `max_steps` is `--max-steps`."""
    return "--" + name.replace("_", "-")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word nearest to `word`, or nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def resolve(config_class: type[C], yaml_path: Path | None, argv: Sequence[str]) -> C:
    """The configuration of one run, from a YAML file (if any) and flags; UserError if faulty."""
    values: dict[str, Any] = {}
    if yaml_path is not None:
        values = coerce(config_class, read_yaml(yaml_path), str(yaml_path))
    return _parse_flags(config_class, values, argv, yaml_path)


def build(config_class: type[C], settings: Mapping[str, object], where: str) -> C:
    """The configuration that a mapping describes; `where` names its place in messages."""
    values = coerce(config_class, settings, where)
    if missing := [f"`{name}`" for name in _required(config_class) if name not in values]:
        verb = "is" if len(missing) == 1 else "are"
        raise UserError(f"{where}: {_listed(missing)} {verb} missing")
    return config_class(**values)


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in a YAML file."""
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _unique_keys_loader())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"{path}{line}: {problem}; mend the YAML") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}; write `key: value` lines")
    return {str(key): value for key, value in content.items()}


def _unique_keys_loader() -> type:
    """YAML's safe loader, to which a key that stands twice is an error."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    place = node.value[number][0].start_mark
                    raise yaml.MarkedYAMLError(problem=f"`{key}` stands twice", problem_mark=place)
            return super().construct_mapping(node, deep)

    return Loader


def coerce(config_class: type, settings: Mapping[str, object], where: str) -> dict[str, Any]:
    """`settings` as the field types of `config_class`; unknown keys and wrong types are errors."""
    types, by_itself = get_type_hints(config_class), automatic(config_class)
    settings = {k: 0 if v == "auto" and k in by_itself else v for k, v in settings.items()}
    for key in settings:
        if key not in types:
            raise UserError(
                f"{where}: unknown key `{key}`"
                + (nearest(key, types) or "; its keys are the flags of `--help`, with underscores")
            )
    return {key: _convert(value, types[key], where, key) for key, value in settings.items()}


def automatic(config_class: type) -> set[str]:
    """Settings that may be `auto`."""
    hints = get_type_hints(config_class, include_extras=True)
    return {name for name, hint in hints.items() if OrAuto in getattr(hint, "__metadata__", ())}


def _convert(value: object, wanted: Any, where: str, key: str) -> Any:
    origin, choices = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        if value is None and NoneType in choices:
            return None
        several = isinstance(value, list | tuple)  # of `str | tuple[str, ...]`
        fitting = [t for t in choices if t is not NoneType and (get_origin(t) is tuple) == several]
        others = [t for t in choices if t is not NoneType]
        return _convert(value, (fitting or others)[0], where, key)
    if origin is Literal:
        if value in choices:
            return value
        raise UserError(f"{where}: `{key}` is {value!r}; choose from {', '.join(choices)}")
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(item, choices[0], where, key) for item in items)
    if wanted is Path and isinstance(value, str | Path):
        return Path(value)
    if wanted is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):  # YAML reads 1e-5 as text
            return float(value)  # type: ignore[arg-type]
    if type(value) is wanted:
        return value
    raise UserError(f"{where}: `{key}` is {value!r}; give {in_words(wanted)}")


def _required(config_class: type) -> list[str]:
    return [
        f.name
        for f in fields(config_class)
        if f.default is MISSING and f.default_factory is MISSING
    ]


def _parse_flags(
    config_class: type[C], values: dict[str, Any], argv: Sequence[str], yaml_path: Path | None
) -> C:
    """Flags over `values`, through tyro, whose boxed errors become one line."""
    import tyro

    types = get_type_hints(config_class)
    known = {flag(n) for n in types} | {flag("no-" + n) for n, t in types.items() if t is bool}
    given = {flag(a[2:].partition("=")[0]) for a in argv if a.startswith("--") and a != "--"}
    for unknown in sorted(given - known):
        raise UserError(f"unknown flag {unknown}" + (nearest(unknown, known) or "; see --help"))
    required = _required(config_class)
    if missing := [n for n in required if n not in values and flag(n) not in given]:
        flags, names = _listed(map(flag, missing)), _listed(f"`{name}`" for name in missing)
        verb, it = ("is", "it") if len(missing) == 1 else ("are", "them")
        in_file = f", or {names} in {yaml_path}" if yaml_path else ""
        raise UserError(f"{flags} {verb} missing; give {it}{in_file}")
    by_itself = {flag(name) for name in automatic(config_class)}
    words = [
        "0" if word == "auto" and before in by_itself else word
        for before, word in zip(["", *argv], argv, strict=False)
    ]
    words = [f"{w[:-5]}=0" if w[:-5] in by_itself and w.endswith("=auto") else w for w in words]
    start = dict.fromkeys(required, tyro.MISSING) | values
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(config_class, args=words, default=config_class(**start), add_help=False)
    except SystemExit:
        raise UserError(_one_line(errors.getvalue(), config_class, argv)) from None


def _listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _one_line(box: str, config_class: type, argv: Sequence[str]) -> str:
    """The message inside one of tyro's error boxes, the lines between its first two rules; where it
    speaks of a flag, our own.
    """
    parts = re.split(r"(?m)^.*[-─]{8,}.*$", box)
    text = " ".join((parts[1] if len(parts) > 1 else box).replace("│", " ").split())
    types = {flag(name): (name, kind) for name, kind in get_type_hints(config_class).items()}
    named = [word for word in re.findall(r"--[\w-]+", text) if word in types]
    if not named:
        return text.rstrip(".") + "; see --help"
    name, kind = types[named[0]]
    words = [w for word in argv for w in (word.split("=", 1) if word[:2] == "--" else [word])]
    behind = list(takewhile(lambda w: w[:2] != "--", words[words.index(named[0]) + 1 :]))
    remedy = f"give {in_words(kind, name in automatic(config_class))}"
    if not behind:
        return f"{named[0]} has no value; {remedy}"
    return f"{named[0]} is {' '.join(behind)!r}; {remedy}"


def as_dict(config: Any) -> dict[str, object]:
    """Every setting as plain values, for config.yaml."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def default_settings(config_class: Any) -> dict[str, object]:
    """Every setting that has a default, as plain values; of a class or of one of its objects."""
    return {f.name: _plain(f.default) for f in fields(config_class) if f.default is not MISSING}


def _plain(value: object) -> object:
    """A setting's value as YAML holds it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
