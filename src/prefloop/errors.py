"""The user's mistakes, and how errors are told in one line."""

from __future__ import annotations


class UserError(ValueError):
    """The user's mistake, told in one line: what is wrong, where, and how to mend it (exit 2)."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the command (exit 143), as Ctrl-C would have (exit 130)."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in main memory; torch is known by its words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def located(where: str) -> str:
    """`where` as the beginning of an error line, or nothing where it is not known."""
    return f"{where}: " if where else ""
