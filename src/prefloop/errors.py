"""The user's mistakes, and how errors are told in one line."""

from __future__ import annotations

import errno
import re

AGAIN = "make room, then give the same command again"
NO_STORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)
"""A disk that is full, or that went away."""


class UserError(ValueError):
    """The user's mistake, told in one line: what is wrong, where, and how to mend it (exit 2)."""


class Terminated(KeyboardInterrupt):
    """SIGTERM ended the command (exit 143), as Ctrl-C would have (exit 130)."""


class RankFailed(RuntimeError):
    """Another rank ended this one, told in one line; `code` is the exit code of both."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in main memory; torch is known by its words."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def disk_error(error: BaseException | None) -> BaseException | None:
    """Of an error and those that led to it, the one by which a disk is full or went away.

    Errors of safetensors are known by their words; torch's hide the one that they came from.
    """
    while error is not None:
        said = re.search(r"\(os error (\d+)\)", str(error))
        if (int(said[1]) if said else getattr(error, "errno", None)) in NO_STORE:
            return error
        error = error.__cause__ or error.__context__
    return None


class TooLong(UserError):
    """A row beyond --max-length: nothing is wrong with it but its length."""


def first_line(error: BaseException) -> str:
    """What an error says, for a message of one line: a heading with what stands under it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if lines[0].startswith("Traceback"):
        return lines[-1]
    heading = lines[0].endswith(":") and len(lines) > 1
    return f"{lines[0]} {lines[1]}" if heading else lines[0]


def located(where: str) -> str:
    """`where` as the beginning of an error line, or nothing where it is not known."""
    return f"{where}: " if where else ""
