"""`python -m benchmarks WORK`: prefloop against a peer, turn by turn, on the same rows and weights.

Every side is a process of its own (TRL in a venv of its own, made here). The first turn of each
warms it up and must give the same loss; then the sides take turns, A B A B, and the ratio of the
medians is printed with the lowest and highest ratio of neighbouring turns. JSON goes to build/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.meter import MARK
from benchmarks.work import WORKS, write_rows
from prefloop import provenance
from prefloop.models.load import load_policy, load_tokenizer
from prefloop.recipes.fetch import fetch_model, fetch_movie_ratings
from prefloop.recipes.sentiment_data import clean

BUILD = Path("build/benchmarks")
TRL = ("transformers==5.23.0", "trl==1.16.0", "accelerate==1.15.0", "datasets==5.2.0")
MEASURES = ("cpu", "wall", "peak_gib")
SAME_LOSS = {"float32": 2e-4, "bfloat16": 2e-2}  # relative; float32 sums in other orders


@dataclass(frozen=True)
class Form:
    """A side in one of its settings, and the settings of prefloop that it is compared with."""

    side: str
    name: str
    ours: str = "later"


PEERS = {
    "sft": (Form("trl_side", "as-it-comes"), Form("trl_side", "best")),
    "reward": (Form("trl_side", "as-it-comes"), Form("trl_side", "best")),
    "dpo": (
        Form("trl_side", "as-it-comes", "first"),
        Form("trl_side", "best-first", "first"),
        Form("trl_side", "as-it-comes", "later"),
        Form("trl_side", "best", "later"),
    ),
    "generate": (Form("transformers_side", "generate"),),
}


class Side:
    """A running process that takes turns."""

    def __init__(self, python: str, module: str, *words: str, threads: int) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": "0",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        self.process = subprocess.Popen(
            [python, "-m", f"benchmarks.{module}", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(BUILD / f"{module}.log").open("a"),
            text=True,
            env=environment,
        )
        self._answer()

    def turn(self) -> dict[str, Any]:
        """Do the work once."""
        assert self.process.stdin is not None
        self.process.stdin.write("turn\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Stop the process."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                facts: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return facts
        raise SystemExit(f"a side ended; see {BUILD}/*.log")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--dtype", choices=SAME_LOSS, default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    policy, reference = _models()
    rows = BUILD / f"{asked.work}.jsonl"
    if not rows.exists():
        tokenizer = load_tokenizer(policy)
        sentences = [clean(s.text) for s in fetch_movie_ratings()]
        write_rows(WORKS[asked.work], sentences, lambda t: len(tokenizer(t)["input_ids"]), rows)
    results = []
    for form in PEERS[WORKS[asked.work].kind]:
        words = (asked.work, str(rows), policy, reference, asked.dtype)
        python = _trl_python() if form.side == "trl_side" else sys.executable
        sides = (
            Side(sys.executable, "prefloop_side", *words, form.ours, threads=asked.threads),
            Side(python, form.side, *words, form.name, threads=asked.threads),
        )
        try:
            results.append(_compare(form, *sides, asked.rounds, asked.dtype))
        finally:
            for side in sides:
                side.end()
        print(results[-1]["text"], flush=True)
    facts: dict[str, Any] = {
        **vars(asked),
        "revision": provenance.revision(),
        "versions": provenance.versions(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs",
        "results": results,
    }
    name = f"{asked.work}-{asked.dtype}.json"
    (BUILD / name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _compare(form: Form, ours: Side, peer: Side, rounds: int, dtype: str) -> dict[str, Any]:
    """Alternate; ratios are peer over ours, above 1 where ours needs less."""
    first = (ours.turn(), peer.turn())
    if "loss" in first[0]:
        a, b = (turn["loss"] for turn in first)
        if abs(a - b) > SAME_LOSS[dtype] * max(1.0, abs(b)):
            raise SystemExit(f"{form.side} {form.name}: another loss, {b} and ours {a}")
    pairs = [(ours.turn(), peer.turn()) for _ in range(rounds)]
    found: dict[str, Any] = {"form": vars(form), "first": first, "pairs": pairs}
    told = [f"{form.side.removesuffix('_side')} {form.name} / prefloop {form.ours}:"]
    for measure in MEASURES:
        each = [[turn[measure] / turn["tokens"] for turn in pair] for pair in pairs]
        if measure == "peak_gib":
            each = [[turn[measure] for turn in pair] for pair in pairs]
        medians = [statistics.median(column) for column in zip(*each, strict=True)]
        ratios = [b / a for a, b in each]
        found[measure] = {"ratio": medians[1] / medians[0], "low": min(ratios), "high": max(ratios)}
        shown = [statistics.median(p[side][measure] for p in pairs) for side in (0, 1)]
        told.append(
            f"{measure} {medians[1] / medians[0]:.2f}x [{min(ratios):.2f}, {max(ratios):.2f}] "
            f"({shown[1]:.2f} / {shown[0]:.2f})"
        )
    return found | {"text": "  ".join(told)}


def _models() -> tuple[str, str]:
    """The reference, and a policy that has moved a little from it, so that no loss is trivial."""
    reference, policy = str(fetch_model("smollm2-135m-instruct")), BUILD / "policy"
    if not (policy / "config.json").exists():
        model = load_policy(reference, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.trainable():
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.01 * float(p.std()))
        model.hf.save_pretrained(policy)
        model.tokenizer.save_pretrained(policy)
    return str(policy), reference


def _trl_python() -> str:
    """TRL's interpreter; its venv is made the first time, torch first so that it is the CPU's."""
    folder = Path("build/trl116")
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in (("torch==2.13.0",), TRL):
            words = [str(python), "-m", "pip", "install", "--quiet", *packages]
            subprocess.run(words, check=True)
        (folder / ".ready").touch()
    return str(python)


if __name__ == "__main__":
    main()
