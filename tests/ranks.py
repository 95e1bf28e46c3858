"""Processes started as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 900  # after which a hang is a failure; a busy machine needs minutes


def on_ranks(count: int, *words: str) -> list[tuple[str, int]]:
    """What each rank of `python WORDS` wrote to stderr, and its exit code; one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    killer = threading.Timer(SECONDS, lambda: [process.kill() for process in ranks])
    killer.start()
    outcomes = [(process.communicate()[1], process.returncode) for process in ranks]
    killer.cancel()
    return outcomes
