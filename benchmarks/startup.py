"""From the start of a command to its help text, or to its first finished optimiser step."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.sides import BUILD, prepare_models, prepare_rows
from benchmarks.work import read_texts

POLL = 0.01
ROUNDS = 3
FOLDER = BUILD / "startup"
PREFLOOP = (str(Path(sys.executable).with_name("prefloop")),)


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """The best of a few starts of each, printed."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    found: dict[str, Any] = {}
    found["--help"] = [to_the_end(("--help",), environment) for _ in range(ROUNDS)]
    for command in ("sft", "dpo"):
        words = training_words(command, dtype)
        found[command] = [to_the_first_step(words, environment) for _ in range(ROUNDS)]
    for name, starts in found.items():
        best = {key: min(start[key] for start in starts) for key in ("cpu", "wall")}
        print(f"{name}: CPU {best['cpu']:.2f} s, wall {best['wall']:.2f} s", flush=True)
    return {"startup": found}


def to_the_end(words: tuple[str, ...], environment: dict[str, str]) -> dict[str, float]:
    """Seconds until a command ends."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run([*PREFLOOP, *words], check=True, stdout=subprocess.DEVNULL, env=environment)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": wall}


def training_words(command: str, dtype: str) -> tuple[str, ...]:
    """A command line that trains SmolLM2 on 16 rows, 4 a step; pairs take the next row's answer."""
    models, rows = prepare_models(), read_texts(prepare_rows("ppo"))
    data = BUILD / f"startup-{command}.jsonl"
    answers = [row["completions"][0] for row in rows]
    columns = {"completion": answers}
    if command == "dpo":
        columns = {"chosen": answers, "rejected": answers[1:] + answers[:1]}
    lines = [
        {"prompt": row["prompt"]} | {name: values[i] for name, values in columns.items()}
        for i, row in enumerate(rows)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = (command, "--model", f"{models}/policy", "--data", str(data), "--dtype", dtype)
    return (*words, "--batch-size", "4", "--output", str(FOLDER))


def to_the_first_step(words: tuple[str, ...], environment: dict[str, str]) -> dict[str, float]:
    """Seconds until the first line of metrics.jsonl stands; the run is then stopped."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    log, metrics = (BUILD / "startup.log").open("a"), FOLDER / "metrics.jsonl"
    began = time.perf_counter()
    process = subprocess.Popen([*PREFLOOP, *words], stdout=log, stderr=log, env=environment)
    while not (metrics.exists() and metrics.stat().st_size):
        if process.poll() is not None:
            raise SystemExit(f"{words[0]} ended before its first step; see {log.name}")
        time.sleep(POLL)
    wall, cpu = time.perf_counter() - began, cpu_seconds(process.pid)
    process.kill()
    process.wait()
    return {"cpu": cpu, "wall": wall}


def cpu_seconds(pid: int) -> float:
    """User and system time of a running process (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
