"""One side of a comparison, as a process that does its work each time it is told to.

It reads a line from its standard input for every turn, and answers with a line of JSON. Imports
nothing but the standard library: every side's venv can.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Meter:
    """Seconds and memory between `start` and `stop`."""

    def start(self) -> None:
        """Forget the peak so far (Linux), and look at the clocks."""
        Path("/proc/self/clear_refs").write_text("5")
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> dict[str, float]:
        """Wall and CPU seconds since, and this process's peak memory in GiB."""
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20  # type: ignore[index]
        return {"wall": wall, "cpu": cpu, "peak_gib": peak}


MARK = "turn "  # begins the lines that are for the driver: trainers print, too


def tell(**facts: Any) -> None:
    """Answer the driver."""
    print(MARK + json.dumps(facts), flush=True)


def wait() -> None:
    """Until the driver asks for the next turn; the process ends when the driver is gone."""
    if not sys.stdin.readline():
        sys.exit(0)


def serve(turn: Callable[[], dict[str, Any]]) -> None:
    """Take turns for ever; a turn returns what is to be compared (its loss), and its tokens."""
    meter = Meter()
    tell(ready=True)
    while True:
        wait()
        meter.start()
        facts = turn()
        tell(**(facts | meter.stop()))
