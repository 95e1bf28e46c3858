"""How far long work is: a bar on a terminal, a line every 30 seconds where there is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from prefloop import terminal

EVERY = 30.0  # seconds between lines


class Progress:
    """The state of some work, shown on standard error with the time gone and the time left.

    Time left is told from the pieces done since it began, so it needs one of them first.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        *,
        leave: bool = True,
        shown: bool = True,
        every: float = EVERY,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`leave`: the bar stays when the work is done; `shown`: False on ranks but the first."""
        self.what, self.total, self.done, self.note = terminal.shown(what), total, done, ""
        self._first, self._every, self._shown = done, every, shown
        self._console = console or Console(stderr=True)
        name = TextColumn("{task.description}", markup=False)  # a model's may hold anything
        columns = name, MofNCompleteColumn(), BarColumn()
        last = TextColumn("{task.fields[times]}", markup=False)
        self._bar = Bar(*columns, last, console=self._console, transient=not leave)
        self._bar.disable = not (shown and self._console.is_terminal)
        self._task = self._bar.add_task(self.what, total=total, completed=done, times="")
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._clock, self._began = clock, clock()

    def __enter__(self) -> Progress:
        self._began = self._clock()
        self._bar.start()
        if self._shown:
            self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._shown:
            self._ticker.join()
        self._bar.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more pieces are done; `note` stands behind the times."""
        self.done, self.note = self.done + count, note or self.note
        self._bar.update(self._task, completed=self.done, times=self.times())

    def times(self) -> str:
        """The time gone and left, and the note."""
        gone, pieces = self._clock() - self._began, self.done - self._first
        parts = [f"{in_words(gone)} gone"]
        if pieces > 0 and self.done < self.total:
            left = gone / pieces * (self.total - self.done)
            parts.append(f"about {in_words(left)} left")
        return " · ".join([*parts, *([self.note] if self.note else [])])

    def _tick(self) -> None:
        """Keeps the bar's clock going, or prints the lines."""
        has_bar = not self._bar.disable
        while not self._over.wait(1.0 if has_bar else self._every):
            if has_bar:
                self._bar.update(self._task, times=self.times())
            else:
                line = f"{self.what} {self.done}/{self.total} · {self.times()}"
                print(line, file=self._console.file, flush=True)


def in_words(seconds: float) -> str:
    """A length of time.

    >>> in_words(9.7), in_words(200), in_words(3900)
    ('10 s', '3 min 20 s', '1 h 05 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
