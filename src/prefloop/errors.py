"""The user's mistakes, and how errors are told in one line."""

from __future__ import annotations


class UserError(ValueError):
    """The user's mistake, told in one line: what is wrong, where, and how to mend it (exit 2)."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the command (exit 143), as Ctrl-C would have (exit 130)."""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def located(where: str) -> str:
    """`where` as the beginning of an error line, or nothing where it is not known."""
    return f"{where}: " if where else ""
