"""The faults: when they come is drawn from a seed, and what must hold after them is asserted."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefloop.resume import checkpoints, flaw
from tests.chaos.cases import Case, assert_finished, assert_whole, result
from tests.chaos.work import Work, begin, changes

KINDS = ("kill", "terminate", "disk", "damage")
MOST = 3  # kills of one run


@dataclass(frozen=True)
class Whole:
    """A case's run that nothing disturbed: what came of it, and what it took."""

    result: dict[str, Any]
    cpu: list[float]  # seconds of each rank
    changes: int  # of files, by the first rank
    size: int  # bytes


def undisturbed(case: Case, world: Path, folder: Path) -> Whole:
    """Runs the case to its end."""
    output = folder / "output"
    work = begin(case.words(world, output), case.ranks, folder / "logs", output)
    cpu = [0.0] * case.ranks
    while not all(map(work.ended, range(case.ranks))):
        cpu = [work.cpu(rank) for rank in range(case.ranks)]
    assert work.end() == [0] * case.ranks, work.said()
    assert_finished(output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Whole(result(output), cpu, changes(work), size)


@dataclass(frozen=True)
class Trial:
    """One run of a case that is disturbed, and then goes on to its end."""

    kind: str
    case: Case
    whole: Whole
    world: Path
    folder: Path
    draw: random.Random

    @property
    def output(self) -> Path:
        """Where the run writes."""
        return self.folder / "output"

    def faults(self) -> list[str]:
        """Runs it; returns what befell it. AssertionError where something is not as it must be."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        befell = list(getattr(self, f"_{self.kind}")())
        self._finish(self._begin())
        shutil.rmtree(self.folder)
        return befell

    def _begin(self, die_at: int = 0) -> Work:
        words = self.case.words(self.world, self.output)
        return begin(words, self.case.ranks, self.folder / "logs", self.output, die_at)

    def _finish(self, work: Work) -> None:
        codes = work.end()
        assert codes == [0] * self.case.ranks, (codes, work.said())
        assert_finished(self.output)
        assert_whole(self.output)
        mine = result(self.output)
        assert mine.keys() == self.whole.result.keys(), mine.keys() ^ self.whole.result.keys()
        for name, content in self.whole.result.items():
            assert mine[name] == content, f"{name} differs"

    # --- kill -9 ----------------------------------------------------------------------------------

    def _kill(self) -> Iterator[str]:
        """At any moment by the CPU time of a rank, or before any change of a file."""
        for _ in range(self.draw.randint(1, MOST)):
            if killed := self._killed():
                yield killed

    def _killed(self) -> str:
        """What was killed when; "" where the run was done before."""
        if self.draw.random() < 0.5:
            at = self.draw.randint(1, self.whole.changes)
            work = self._begin(die_at=at)
            when = f"before change {at} of {self.whole.changes}"
        else:
            part, victim = self.draw.random(), self.draw.randrange(self.case.ranks)
            both = self.draw.random() < 0.3
            work = self._begin()
            if work.wait_cpu(victim, part * self.whole.cpu[victim]):
                work.signal(range(self.case.ranks) if both else [victim], signal.SIGKILL)
            when = f"rank {victim}{' and all' if both else ''} at {part:.0%} of its CPU time"
        codes = work.end()
        assert_whole(self.output)
        return when if -signal.SIGKILL in codes else ""

    # --- SIGTERM ----------------------------------------------------------------------------------

    def _terminate(self) -> Iterator[str]:
        """To all ranks, as a launcher does; sometimes twice. Where no rank is in the loop yet, or
        after the second signal, a rank may hear of another's end before its own signal.
        """
        part, twice = self.draw.random(), self.draw.random() < 0.3
        work = self._begin()
        if not work.wait_cpu(0, part * self.whole.cpu[0]):
            work.end()
            return
        work.signal(range(self.case.ranks), signal.SIGTERM)
        if twice:
            work.wait_cpu(0, work.cpu(0) + 0.02)
            work.signal(range(self.case.ranks), signal.SIGTERM)
        codes = work.end()
        assert_whole(self.output)
        lost = {1} if self.case.ranks > 1 else set()
        unready = {-signal.SIGTERM}  # Python itself had not come so far, or was done
        assert set(codes) <= {143} | lost | unready, (codes, work.said())
        assert set(codes) - lost, (codes, work.said())
        yield f"at {part:.0%} of the CPU time{', twice' if twice else ''}"

    # --- a disk that fills ------------------------------------------------------------------------

    def _disk(self) -> Iterator[str]:
        """The run's directory lies on a small file system; then there is room again."""
        while True:
            room = int(self.draw.random() * self.whole.size)
            with small_disk(self.output, room):
                work = self._begin()
                codes = work.end()
                if codes == [0] * self.case.ranks:  # room enough
                    shutil.rmtree(self.folder / "kept", ignore_errors=True)
                    continue
                assert codes[0] == 2, (codes, work.said())
                said = work.logs[0].read_text()
                assert "make room, then give the same command again" in said, said
                assert "Traceback" not in said, said
                shutil.copytree(self.output, self.folder / "kept")
            shutil.rmtree(self.output, ignore_errors=True)
            (self.folder / "kept").rename(self.output)
            assert_whole(self.output)
            yield f"{room:,} bytes"
            return

    # --- a damaged checkpoint ---------------------------------------------------------------------

    def _damage(self) -> Iterator[str]:
        """A byte flipped, or a file cut, in the newest checkpoint of a run that was killed."""
        while not (found := self._newest()):
            work = self._begin(die_at=self.draw.randint(1, self.whole.changes))
            if work.end() == [0] * self.case.ranks:
                shutil.rmtree(self.output)
        file = self.draw.choice(sorted(p for p in found.rglob("*") if p.is_file()))
        data = bytearray(file.read_bytes())
        place = self.draw.randrange(len(data))
        if self.draw.random() < 0.5:
            data[place] ^= 1 << self.draw.randrange(8)
            done = f"bit flipped at {place:,}"
        else:
            del data[place:]
            done = f"cut at {place:,}"
        file.write_bytes(data)
        seen, name = flaw(found), found.relative_to(self.output)
        assert seen or file.name == "manifest.json"  # of which white space means nothing
        work = self._begin()
        self._finish(work)
        if seen:
            assert f"{found}: {seen}; kept as damaged-{found.name}-1" in work.said(), work.said()
            kept = found.with_name(f"damaged-{found.name}-1")
            assert kept.joinpath(file.relative_to(found)).read_bytes() == data
        yield f"{name}/{file.name}: {done}"

    def _newest(self) -> Path | None:
        for folder in self.output.rglob("checkpoints"):
            if not (folder.parent / "model").exists():
                for path in checkpoints(folder.parent):
                    return path
        return None


@contextmanager
def small_disk(folder: Path, room: int) -> Iterator[None]:
    """`folder` is a file system of about so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    size = max(room, 4 * os.sysconf("SC_PAGE_SIZE"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
