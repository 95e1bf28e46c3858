"""What a person types: messages of a line or several, edited, with a history on a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

HISTORY_LINES = 1000
BLOCK = '"""'
LEAVE = "(/quit or Ctrl-D leaves, /help says more)"


class Reader:
    """Messages from a terminal or a file; a context manager that keeps a terminal's history.

    A line that ends in a backslash goes on in the next one, and so do all lines between two lines
    of three quotation marks.
    """

    def __init__(self, source: TextIO, out: TextIO, history: Path | None = None) -> None:
        self.source, self.out = source, out
        self.interactive = source.isatty()
        self._edits = self.interactive and source is sys.stdin
        self._history = history or history_path()

    def __enter__(self) -> Reader:
        if self._edits:
            import readline

            readline.set_auto_history(False)
            with contextlib.suppress(OSError):  # there is none yet, or it cannot be read
                readline.read_history_file(self._history)
        return self

    def __exit__(self, *error: object) -> None:
        if self._edits:
            import readline

            readline.set_history_length(HISTORY_LINES)
            with contextlib.suppress(OSError):  # a home that cannot be written costs the history
                self._history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._history.touch(mode=0o600)
                readline.write_history_file(self._history)
                self._history.chmod(0o600)

    def messages(self) -> Iterator[str]:
        """What is typed, but for empty lines, until the input ends; Ctrl-C drops what is begun."""
        while True:
            try:
                message = self._message()
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                print(f"\n{LEAVE}", file=self.out)
                continue
            if message is None:
                return
            try:
                message.encode()
            except UnicodeEncodeError:
                print("(not UTF-8: this line is left out)", file=self.out)
                continue
            if message.strip():
                yield message

    def ask(self, question: str) -> str | None:
        """One line that is no message, without the spaces around it; None where the input ends."""
        line = self._line(question)
        return None if line is None else line.strip()

    def _message(self) -> str | None:
        line = self._line("> ")
        if line is None:
            return None
        parts = [line]
        if line.strip() == BLOCK:
            parts = []
            while (line := self._line(". ")) is not None and line.strip() != BLOCK:
                parts.append(line)
        else:
            while parts[-1].endswith("\\"):
                parts[-1] = parts[-1][:-1]
                if (line := self._line(". ")) is None:
                    break
                parts.append(line)
        self._remember(parts)
        return "\n".join(parts)

    def _remember(self, lines: list[str]) -> None:
        if self._edits:
            import readline

            for line in lines:
                readline.add_history(line)

    def _line(self, prompt: str) -> str | None:
        """One line without its end; None where the input ends."""
        if self._edits:
            try:
                return input(prompt)
            except EOFError:
                print(file=self.out)
                return None
        if self.interactive:
            print(prompt, end="", file=self.out, flush=True)
        line = self.source.readline()
        return line.removesuffix("\n") if line else None


def history_path() -> Path:
    """Where the lines that were typed are kept, for their owner alone."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "prefloop" / "chat_history"
