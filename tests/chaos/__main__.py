"""`python -m tests.chaos [--seed 0] [--folder chaos] [--kills 100] [--others 20] [--minutes 15]`

Kills (-9), SIGTERM, disks that fill and damaged checkpoints over the four trainers, on one rank and
on two, and a pipeline, with tiny models. Every run must go on to the bits of the undisturbed one,
and nothing may be half written. Each trial is a line of FOLDER/trials.jsonl; the same command goes
on after the last one. Disks that fill are mounted, which takes root; else they are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos.cases import CASES, Case
from tests.chaos.faults import KINDS, Trial, Whole, undisturbed
from tests.training.small import write_world


def main() -> int:
    """Makes what is missing of the trials; 1 where one did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("chaos"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--others", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    folder: Path = given.folder.absolute()
    journal = folder / "trials.jsonl"
    world = _world(folder)
    done = list(map(json.loads, journal.read_text().splitlines())) if journal.exists() else []
    until = time.monotonic() + 60 * given.minutes
    wholes: dict[str, Whole] = {}
    for kind in KINDS:
        if kind == "disk" and os.geteuid() != 0:
            print("no disk fills: mounting one takes root", flush=True)
            continue
        wanted, number = given.kills if kind == "kill" else given.others, 0
        while sum(len(row["faults"]) for row in done if row["kind"] == kind) < wanted:
            case = CASES[number % len(CASES)]
            number += 1
            if any((row["kind"], row["number"]) == (kind, number) for row in done):
                continue
            if time.monotonic() > until:
                print(f"{len(done)} trials; the same command goes on", flush=True)
                return 0
            if case.name not in wholes:
                wholes[case.name] = _whole(case, world, folder)
            draw = random.Random(f"{given.seed} {kind} {number}")
            row = {"kind": kind, "number": number, "case": case.name}
            trial = Trial(kind, case, wholes[case.name], world, folder / "trial", draw)
            began = time.monotonic()
            row["faults"] = trial.faults()
            row["seconds"] = round(time.monotonic() - began, 1)
            done.append(row)
            with journal.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{kind} {number} {case.name}: {'; '.join(row['faults'])}", flush=True)
    _table(done)
    return 0


def _world(folder: Path) -> Path:
    """The models and rows, made by a process of its own: a fork takes no threads along."""
    world = folder / "world"
    if not world.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if not (pid := os.fork()):
            write_world(folder / "new")
            (folder / "new").rename(world)
            os._exit(0)
        os.waitpid(pid, 0)
        assert world.exists()
    return world


def _whole(case: Case, world: Path, folder: Path) -> Whole:
    """The undisturbed run, made once; all runs lie in one place, since their records hold paths."""
    kept = folder / f"{case.name}.pickle"
    if not kept.exists():
        kept.write_bytes(pickle.dumps(undisturbed(case, world, folder / "trial")))
        shutil.rmtree(folder / "trial")
    whole: Whole = pickle.loads(kept.read_bytes())
    return whole


def _table(done: list[dict[str, Any]]) -> None:
    """Faults by kind and case."""
    counts = Counter((row["kind"], row["case"]) for row in done for _ in row["faults"])
    print("|".join(["", "case", *KINDS, ""]))
    for case in [case.name for case in CASES]:
        print("|".join(["", case, *(str(counts[kind, case]) for kind in KINDS), ""]))
    totals = [str(sum(n for (k, _), n in counts.items() if k == kind)) for kind in KINDS]
    print("|".join(["", "all", *totals, ""]))


sys.exit(main())
