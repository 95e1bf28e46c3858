"""What ranks know of each other's end: who failed and why, who did not come, how long to wait."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from prefloop import distributed
from prefloop.errors import (
    RankFailed,
    Terminated,
    UserError,
    disk_error,
    first_line,
    out_of_memory,
)

LONG = timedelta(days=1)
"""Ranks wait so long while one of them writes or reads what may be terabytes. One that dies is
noticed at once; this is for one that hangs.
"""
GRACE = 5.0  # seconds in which ranks that wait in one collective all notice that it broke
KEY = "prefloop/end"


@contextmanager
def patiently() -> Iterator[None]:
    """Within it the ranks wait a day for each other, and not `distributed.PATIENCE`."""
    if distributed.world() == 1:
        yield
        return
    before = c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
    c10d._set_pg_timeout(LONG)
    try:
        yield
    finally:
        c10d._set_pg_timeout(before)


def lost_rank(error: BaseException, grace: float = GRACE) -> RankFailed | None:
    """Tells the other ranks why this one ends. Where it ends because a collective broke: the rank
    for whose sake it did, and what that one told, if it told anything.
    """
    if distributed.world() == 1:
        return None
    broke = broken(error)
    try:
        store = PrefixStore(KEY, c10d._get_default_store())
        said = ["", 0] if broke else [_reason(error), exit_code(error)]
        store.set(str(distributed.rank()), json.dumps(said))
        if broke is None:
            return None
        ends = _ends(store, grace)
    except RuntimeError:  # the store went with the process that held it
        if broke is None or isinstance(error, KeyboardInterrupt):  # perhaps ended by the same
            return None
        return RankFailed("lost rank 0, which kept what the ranks tell each other; see its words")
    told = {rank: (why, code) for rank, (why, code) in ends.items() if why}
    # A launcher terminates all ranks when one fails: why that one did is told first.
    for rank, (why, code) in sorted(told.items(), key=lambda item: item[1][1] > 2):
        return RankFailed(f"rank {rank} failed: {why}", code)
    silent = [str(r) for r in range(distributed.world()) if r not in ends]
    if not silent:
        return RankFailed(f"the ranks lost each other ({first_line(broke)})")
    names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(silent)}"
    if "imed out" in str(broke):
        return RankFailed(f"{names} did not come to what the others waited for: it hangs")
    return RankFailed(f"lost {names} without a word: killed, perhaps for memory")


def broken(error: BaseException | None) -> BaseException | None:
    """Of an error and those that led to it, the one by which a collective broke."""
    while error is not None:
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and "gloo" in str(error)
        ):
            return error
        error = error.__cause__ or error.__context__
    return None


def _ends(store: Store, grace: float) -> dict[int, tuple[str, int]]:
    """By rank: why it ended ("": because it lost another), and its exit code.

    Waits for those that notice later, but not when one has said why.
    """
    found: dict[int, tuple[str, int]] = {}
    until = time.monotonic() + grace
    with suppress(KeyboardInterrupt):  # a launcher's SIGTERM: what is known by now
        while len(found) < distributed.world() and time.monotonic() < until:
            for rank in range(distributed.world()):
                if rank not in found and store.check([str(rank)]):
                    why, code = json.loads(store.get(str(rank)))
                    found[rank] = why, code
            if any(why for why, _ in found.values()):
                break
            time.sleep(0.05)
    return found


def _reason(error: BaseException) -> str:
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "terminated" if isinstance(error, Terminated) else "interrupted"
    return f"{type(error).__name__}: {first_line(error)}"


def exit_code(error: BaseException) -> int:
    """That of the command line."""
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, Terminated) else 130
    yours = isinstance(error, UserError) or out_of_memory(error) or disk_error(error) is not None
    return 2 if yours else 1
