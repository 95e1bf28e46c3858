"""`python -m benchmarks.cuda`: tests, correctness, memory and speed on a GPU, in 8 minutes.

Prints a table, and writes build/benchmarks/cuda.json after each part. A part that fails does not
stop the rest; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cuda.parts import PARTS
from benchmarks.cuda.run import TESTS, Found, run_parts, table
from prefloop import provenance

BUILD = Path("build/benchmarks")


def main() -> int:
    """Run the parts, print and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__)
    names = [TESTS, *PARTS]
    parser.add_argument("--part", nargs="*", choices=names, default=names, dest="parts")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="small models, for any processor")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all parts together")
    parser.add_argument("--output", type=Path, default=BUILD / "cuda.json")
    asked = parser.parse_args()
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "asked": {name: str(value) for name, value in vars(asked).items()},
        "device": device_name(asked.device),
        "revision": provenance.revision(),
        "versions": provenance.versions(),
        "cpus": os.cpu_count(),
    }

    def keep(found: dict[str, Found]) -> None:
        text = json.dumps(facts | {"parts": found}, indent=2) + "\n"
        asked.output.write_text(text, encoding="utf-8")

    scale = "tiny" if asked.tiny else "full"
    command = [sys.executable, "-m", "benchmarks.cuda.worker", scale, asked.device]
    start = time.monotonic()
    found = run_parts(asked.parts, command, asked.seconds, keep)
    print(f"\n{facts['device']}, {time.monotonic() - start:.0f} s in all\n")
    print(*table(found), sep="\n")
    return int(any(part["failed"] for part in found.values()))


def device_name(device: str) -> str:
    """A GPU's own name, any other device's as it was given."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return device
    return torch.cuda.get_device_name(device)


if __name__ == "__main__":
    sys.exit(main())
