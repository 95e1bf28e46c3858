"""Signals that end a run: the first lets the step under way finish, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from prefloop.errors import Terminated
from prefloop.peers import broken

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupt:
    """Makes flags of the first signal, so that the loop can save; the second raises at once."""

    def __init__(self) -> None:
        self.asked = False
        self.terminated = False  # by SIGTERM, or by a terminal that went away

    def __enter__(self) -> Interrupt:
        before = {number: signal.getsignal(number) for number in SIGNALS}
        if before[signal.SIGHUP] == signal.SIG_IGN:  # nohup
            del before[signal.SIGHUP]
        self._before = before
        for number in before:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.asked and broken(error):  # the other ranks, asked too, were gone before this one
            raise self.error(self.terminated) from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        self.terminated |= number != signal.SIGINT
        if again:
            raise self.error(self.terminated)

    def heed(self) -> None:
        """Raises what a signal asked for and no step came to hear of: the result was written."""
        if self.asked:
            raise self.error(self.terminated)

    @staticmethod
    def error(terminated: bool) -> KeyboardInterrupt:
        """What ends the run once it is saved."""
        return Terminated() if terminated else KeyboardInterrupt()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within it signals end nothing: those that come are heard when the block is done."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears them
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {n: handler for n, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for again in came:
            signal.raise_signal(again)
