"""A progress bar with tokens per second and time left, on a terminal's standard error only."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from prefloop import distributed


class Progress:
    """The bar of one training run."""

    def __init__(self, total_steps: int, done: int) -> None:
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
        )
        self._bar.disable = distributed.rank() > 0 or not self._bar.console.is_terminal
        self._task = self._bar.add_task("", total=total_steps, completed=done)
        self._last = time.perf_counter()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, tokens: int, loss: float | None) -> None:
        """Shows that `step` is done."""
        now = time.perf_counter()
        rate, self._last = tokens / (now - self._last), now
        text = f"loss {loss:.4f} · {rate:,.0f} tokens/s" if loss is not None else "left out"
        self._bar.update(self._task, completed=step, description=text)
