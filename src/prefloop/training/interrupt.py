"""Signals that end a run: the first lets the step under way finish, the second ends it at once."""

from __future__ import annotations

import signal
from types import FrameType

from prefloop.errors import Terminated

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

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        self.terminated |= number != signal.SIGINT
        if again:
            raise self.error(self.terminated)

    @staticmethod
    def error(terminated: bool) -> KeyboardInterrupt:
        """What ends the run once it is saved."""
        return Terminated() if terminated else KeyboardInterrupt()
