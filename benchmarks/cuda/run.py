"""The parts one after another: each is given time, and none that fails stops the rest."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

from benchmarks.cuda.scale import Line
from benchmarks.meter import MARK

TESTS = "tests"
"""The part that is pytest's."""
MOST = 200.0
"""Seconds of one part at most: one that hangs leaves time for others."""
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
Found = dict[str, Any]
"""Of a part: `lines`, `seconds`, and why it `failed`, or None."""


class Worker:
    """A process that takes parts (benchmarks/cuda/worker.py), begun anew after one that failed."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command
        self.process: subprocess.Popen[str] | None = None
        self.told: queue.Queue[str | None] = queue.Queue()

    def take(self, name: str, seconds: float, on_line: Callable[[Line], None]) -> str | None:
        """Does a part, within so many seconds; returns why it failed, or None."""
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        end = time.monotonic() + seconds
        with suppress(BrokenPipeError):  # it has ended, as what it told will say
            self.process.stdin.write(f"{name}\n")
            self.process.stdin.flush()
        while True:
            try:
                line = self.told.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.close()
                return f"not done within {seconds:.0f} seconds"
            if line is None:
                code = self.process.wait()
                self.close()
                return f"its process ended with {code}"
            facts = json.loads(line)
            if "failed" in facts:
                self.close()
                return str(facts["failed"])
            if "done" in facts:
                return None
            on_line(facts)

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with suppress(BrokenPipeError):
                self.process.stdin.close()  # type: ignore[union-attr]
            self.reader.join()
            self.process.stdout.close()  # type: ignore[union-attr]
            self.process = None

    def _start(self) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=OFFLINE
        )
        self.told = queue.Queue()
        args = self.process.stdout, self.told
        self.reader = threading.Thread(target=_read, args=args, daemon=True)
        self.reader.start()


def _read(lines: Any, told: queue.Queue[str | None]) -> None:
    """Passes on what is for us, shows the rest, and None at the end."""
    for line in lines:
        if line.startswith(MARK):
            told.put(line.removeprefix(MARK))
        else:
            print(line, end="", file=sys.stderr)
    told.put(None)


def run_parts(
    names: Sequence[str],
    command: Sequence[str],
    seconds: float,
    keep: Callable[[dict[str, Found]], None],
) -> dict[str, Found]:
    """Lines of all parts, each printed as it is found; `keep` is given what there is after each.

    `seconds` is the time for all of them together. `command` starts a worker.
    """
    end, worker = time.monotonic() + seconds, Worker(command)
    found: dict[str, Found] = {}
    try:
        for name in names:
            start, lines = time.monotonic(), list[Line]()

            def on_line(line: Line, name: str = name, lines: list[Line] = lines) -> None:
                lines.append(line)
                print(f"{name}: {line['what']}: {line['result']}", flush=True)

            left = min(end - start, MOST)
            if left <= 0:
                failed: str | None = f"not begun: {seconds:.0f} seconds were over"
            elif name == TESTS:
                failed = run_tests(left, on_line)
            else:
                failed = worker.take(name, left, on_line)
            spent = time.monotonic() - start
            found[name] = {"lines": lines, "seconds": spent, "failed": failed}
            print(f"{name}: {failed or 'done'}, {spent:.0f} s", flush=True)
            keep(found)
    finally:
        worker.close()
    return found


def run_tests(
    seconds: float,
    on_line: Callable[[Line], None],
    command: Sequence[str] | None = None,
) -> str | None:
    """The tests marked `cuda`, several at once where pytest-xdist is there."""
    several = ["-n", "8"] if find_spec("xdist") else []
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-m", "cuda"]
    pytest += ["tests/cuda", *several]  # pytest-benchmark, where it is, warns of several at once
    try:
        ended = subprocess.run(
            command or pytest,
            stdout=subprocess.PIPE,
            text=True,
            timeout=seconds,
            env=OFFLINE | ONE_THREAD,
        )
    except subprocess.TimeoutExpired:
        return f"not done within {seconds:.0f} seconds"
    lines = ended.stdout.strip().splitlines() or [""]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            on_line({"what": "pytest", "result": line})
    on_line({"what": "pytest", "result": lines[-1].strip("= ")})
    if ended.returncode:
        print(ended.stdout, file=sys.stderr)
        return f"pytest ended with {ended.returncode}: {lines[-1].strip('= ')}"
    return None if " passed" in lines[-1] else "no test was run"


def table(found: dict[str, Found]) -> list[str]:
    """Markdown: every line, and how each part ended."""
    rows = ["| part | what | result |", "|---|---|---|"]
    for name, part in found.items():
        rows += [f"| {name} | {line['what']} | {_cell(line['result'])} |" for line in part["lines"]]
        how = f"FAILED: {_cell(part['failed'])}; " if part["failed"] else ""
        rows.append(f"| {name} | whole part | {how}{part['seconds']:.0f} s |")
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
