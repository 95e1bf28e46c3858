"""From YAML and flags to a checked configuration: defaults < YAML < flags. Imports no torch."""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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


def resolve(
    config_class: type[C], yaml_path: Path | None, argv: Sequence[str], prog: str = "prefloop"
) -> C:
    """The configuration of one run, from a YAML file (if any) and flags; UserError if faulty."""
    values: dict[str, Any] = {}
    if yaml_path is not None:
        values = coerce(config_class, read_yaml(yaml_path), str(yaml_path))
    return _parse_flags(config_class, values, argv, yaml_path, prog)


def build(config_class: type[C], settings: Mapping[str, object], where: str) -> C:
    """The configuration that a mapping describes; `where` names its place in messages."""
    values = coerce(config_class, settings, where)
    if missing := [name for name in _required(config_class) if name not in values]:
        raise UserError(f"{where}: `{missing[0]}` is missing")
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
    types, automatic = get_type_hints(config_class), _automatic(config_class)
    settings = {k: 0 if v == "auto" and k in automatic else v for k, v in settings.items()}
    for key in settings:
        if key not in types:
            raise UserError(
                f"{where}: unknown key `{key}`"
                + (nearest(key, types) or "; its keys are the flags of `--help`, with underscores")
            )
    return {key: _convert(value, types[key], where, key) for key, value in settings.items()}


def _automatic(config_class: type) -> set[str]:
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
    kind = {"str": "text", "int": "a whole number", "float": "a number", "Path": "a path"}
    name = kind.get(wanted.__name__, "true or false")
    raise UserError(f"{where}: `{key}` is {value!r}; give {name}")


def _required(config_class: type) -> list[str]:
    return [
        f.name
        for f in fields(config_class)
        if f.default is MISSING and f.default_factory is MISSING
    ]


def _parse_flags(
    config_class: type[C],
    values: dict[str, Any],
    argv: Sequence[str],
    yaml_path: Path | None,
    prog: str,
) -> C:
    """Flags over `values`, through tyro, whose boxed errors become one line."""
    import tyro

    types = get_type_hints(config_class)
    known = {flag(n) for n in types} | {flag("no-" + n) for n, t in types.items() if t is bool}
    given = {flag(a[2:].partition("=")[0]) for a in argv if a.startswith("--") and a != "--"}
    help_wanted = not {"-h", "--help"}.isdisjoint(argv)
    if not help_wanted:
        for unknown in sorted(given - known):
            raise UserError(f"unknown flag {unknown}" + (nearest(unknown, known) or "; see --help"))
        for name in _required(config_class):
            if name not in values and flag(name) not in given:
                in_file = f", or `{name}` in {yaml_path}" if yaml_path else ""
                raise UserError(f"{flag(name)} is missing; give it{in_file}")
    automatic = {flag(name) for name in _automatic(config_class)}
    words = [
        "0" if word == "auto" and before in automatic else word
        for before, word in zip(["", *argv], argv, strict=False)
    ]
    words = [f"{w[:-5]}=0" if w[:-5] in automatic and w.endswith("=auto") else w for w in words]
    start = dict.fromkeys(_required(config_class), tyro.MISSING) | values
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                config_class,
                args=words,
                prog=prog,
                description=f"{config_class.__doc__}\n\n--config FILE reads settings from YAML.",
                default=config_class(**start),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(_one_line(errors.getvalue()))


def _one_line(box: str) -> str:
    """The message inside one of tyro's error boxes: the lines between its first two rules."""
    parts = re.split(r"(?m)^.*[-─]{8,}.*$", box)
    text = parts[1] if len(parts) > 1 else box
    return " ".join(text.replace("│", " ").split()).rstrip(".") + "; see --help"


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
