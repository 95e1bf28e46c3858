"""What a setting takes, in words. No torch."""

from __future__ import annotations

from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

KINDS = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}
GIVE = {str: "text", int: "a whole number", float: "a number", Path: "a path"}


def alternatives(wanted: Any) -> list[Any]:
    """The types of `A | B`, without None; those of any other type are itself."""
    if get_origin(wanted) in (Union, UnionType):
        return [kind for kind in get_args(wanted) if kind is not NoneType]
    return [wanted]


def is_list(wanted: Any) -> bool:
    """Whether several values may be given."""
    return any(get_origin(kind) is tuple for kind in alternatives(wanted))


def simple(wanted: Any) -> Any:
    """The type of one value: of `str | tuple[str, ...]`, of `float | None`."""
    first = alternatives(wanted)[0]
    return get_args(first)[0] if get_origin(first) is tuple else first


def placeholder(wanted: Any, automatic: bool = False) -> str:
    """What stands behind a flag in its help; nothing behind one that is given alone.

    >>> placeholder(str | tuple[str, ...] | None), placeholder(float | None)
    ('TEXT ...', 'NUMBER')
    >>> placeholder(Literal["error", "drop"]), placeholder(int, automatic=True)
    ('error|drop', 'INTEGER|auto')
    """
    one = simple(wanted)
    if one is bool:
        return ""
    word = "|".join(get_args(one)) if get_origin(one) is Literal else KINDS[one]
    return word + ("|auto" if automatic else "") + (" ..." if is_list(wanted) else "")


def in_words(wanted: Any, automatic: bool = False) -> str:
    """What to give, for messages.

    >>> in_words(float | None), in_words(Literal["error", "drop"]), in_words(int, automatic=True)
    ('a number', 'error or drop', 'a whole number or auto')
    """
    one = simple(wanted)
    if one is bool:
        return "true or false"
    word = " or ".join(get_args(one)) if get_origin(one) is Literal else GIVE[one]
    return word + (" or auto" if automatic else "")
