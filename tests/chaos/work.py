"""Commands in processes forked from this one, which has imported all that they need."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# What a command imports on its way: a fork then begins at once.
import prefloop.generation.engine
import prefloop.recipes.pipeline
import prefloop.training.ppo
import prefloop.training.preference
import prefloop.training.reward
import prefloop.training.sft  # noqa: F401
from prefloop.cli import main

LIMIT = 600  # seconds after which a rank that has not ended hangs
ALONE, GIVEN = 2, 30
"""Seconds after which a launcher terminates the ranks that one left behind by failing, and then
kills them: one that waits to meet the first rank hears no signal.
"""
OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
Kill = Callable[["Work"], None]


@dataclass
class Work:
    """A command under way: the processes of its ranks, and their words."""

    ranks: list[int]
    logs: list[Path]
    told: bool = False  # whether the ranks left behind were terminated

    def cpu(self, rank: int) -> float:
        """Seconds that a rank has computed; nothing depends on how busy the machine is."""
        fields = Path(f"/proc/{self.ranks[rank]}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ended(self, rank: int) -> bool:
        """Whether the rank is done or dead; it stays to be waited for."""
        return self._status(rank) is not None

    def _status(self, rank: int) -> int | None:
        """0 of one that ended well, None of one that goes on."""
        flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
        found = os.waitid(os.P_PID, self.ranks[rank], flags)
        return None if found is None else found.si_status

    def signal(self, ranks: Sequence[int], number: int) -> None:
        """Signals some of the ranks (one that has ended hears nothing)."""
        for rank in ranks:
            os.kill(self.ranks[rank], number)

    def wait_cpu(self, rank: int, seconds: float) -> bool:
        """Waits until the rank has computed so long; whether it still goes then."""
        while not self.ended(rank):
            if self.cpu(rank) >= seconds:
                return True
            time.sleep(0.001)
        return False

    def end(self) -> list[int]:
        """Exit codes of the ranks, negative after a signal; a rank that hangs is an error."""
        deadline, left = time.monotonic() + LIMIT, 0.0
        while live := [rank for rank in range(len(self.ranks)) if not self.ended(rank)]:
            now = time.monotonic()
            if now > deadline:
                self.signal(live, signal.SIGKILL)
                raise AssertionError(f"a rank hangs: {self.said()}")
            if any(map(self._status, range(len(self.ranks)))):
                before, left = left, left or now
                if before and now - left > GIVEN:
                    self.signal(live, signal.SIGKILL)
                elif before and now - left > ALONE and not self.told:
                    self.told = True
                    self.signal(live, signal.SIGTERM)
            time.sleep(0.005)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.ranks]

    def said(self) -> str:
        """What all ranks wrote."""
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


def begin(words: Sequence[str], ranks: int, logs: Path, root: Path, die_at: int = 0) -> Work:
    """Starts the command on so many ranks; the first kills itself before its `die_at`-th change
    below `root`.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [logs / f"rank-{rank}" for rank in range(ranks)]
    pids = []
    for rank, path in enumerate(paths):
        if pid := os.fork():
            pids.append(pid)
            continue
        _child(words, rank, ranks, port, path, root, die_at if rank == 0 else 0)
    return Work(pids, paths)


def _child(
    words: Sequence[str], rank: int, ranks: int, port: int, log: Path, root: Path, die_at: int
) -> None:
    """Carries out the command and never returns."""
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if ranks > 1:
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(ranks),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
        _count_changes(root, log.with_suffix(".changes"), die_at)
        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _count_changes(root: Path, tally: Path, die_at: int) -> None:
    """Counts what this process is about to change below `root`, in the size of a file."""
    count, inside, busy = 0, str(root), False
    counter = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def hook(event: str, values: tuple[object, ...]) -> None:
        nonlocal count, busy
        if busy or (event != "open" and event not in OPERATIONS):
            return
        if event == "open" and not int(str(values[2] or 0)) & (os.O_WRONLY | os.O_RDWR):
            return
        if not str(values[0]).startswith(inside):
            return
        count += 1
        os.write(counter, b".")
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def changes(work: Work) -> int:
    """How many changes the first rank made."""
    return work.logs[0].with_suffix(".changes").stat().st_size
