"""`python -m benchmarks WORK`: prefloop against its peers, turn by turn, on the same work.

Every side is a process of its own, peers in venvs of their own that are made here. The first turn
of each warms it up and must give the same loss; then the sides take turns, A B A B, and the ratio
of the medians is printed with the lowest and highest ratio of neighbouring turns. `balance`,
`coverage`, `gpus`, `gradients`, `growth`, `labels`, `log-probs`, `low-bit`, `margins`,
`optimizers`, `paint`, `planning`, `ranks` and `startup` measure prefloop alone, `scaling` simulates
many GPUs, `health` and `uses` read runs that are there; `python -m benchmarks.cuda` measures what
needs a GPU. JSON goes to build/benchmarks/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    balance,
    coverage,
    gpus,
    gradients,
    growth,
    health,
    labels,
    log_probs,
    low_bit,
    margins,
    optimizers,
    paint,
    planning,
    ranks,
    scaling,
    startup,
    uses,
)
from benchmarks.compare import compare
from benchmarks.sides import BUILD, VENVS
from benchmarks.work import WORKS
from prefloop import provenance

ALONE: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "balance": balance.measure,
    "coverage": coverage.measure,
    "gpus": gpus.measure,
    "gradients": gradients.measure,
    "growth": growth.measure,
    "labels": labels.measure,
    "log-probs": log_probs.measure,
    "low-bit": low_bit.measure,
    "margins": margins.measure,
    "optimizers": optimizers.measure,
    "paint": paint.measure,
    "planning": planning.measure,
    "ranks": ranks.measure,
    "scaling": scaling.measure,
    "startup": startup.measure,
}

OF_RUNS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "health": health.measure,
    "uses": uses.measure,
}


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("work", choices=[*WORKS, *ALONE, *OF_RUNS])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", nargs="*", default=[], help="such as trl, vllm; default: all")
    parser.add_argument("--against", default="", help="a revision of prefloop instead of peers")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="what health and uses read")
    asked = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if asked.work in ALONE:
        found = ALONE[asked.work](asked.dtype, asked.threads)
    elif asked.work in OF_RUNS:
        found = OF_RUNS[asked.work](asked.runs)
    else:
        found = compare(
            asked.work, asked.dtype, asked.rounds, asked.threads, asked.peers, asked.against
        )
    facts = vars(asked) | {
        "runs": str(asked.runs),
        "revision": provenance.revision(),
        "versions": provenance.versions(),
        "peers": {side: packages for side, (_, packages) in VENVS.items()},
        "machine": f"{processor()}, {os.cpu_count()} CPUs",
    }
    against = f"-against-{asked.against}" if asked.against else ""
    name = f"{asked.work}-{asked.dtype}{against}.json"
    text = json.dumps(facts | found, indent=2) + "\n"
    (BUILD / name).write_text(text, encoding="utf-8")


def processor() -> str:
    """Its model's name where Linux tells it."""
    try:
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    return named[1] if named else platform.machine()


if __name__ == "__main__":
    main()
