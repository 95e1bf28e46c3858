"""What makes PPO's critic learn: `python -m benchmarks.critic`, on the tasks of critic_tasks.

Each run of the grid changes some things of BASE. A run's numbers are kept in FOLDER/results, and
the command, given again, goes on where it stopped. `--twenty` runs what was chosen with ten seeds
on each task.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.critic_tasks import NEW_TOKENS, Task
from prefloop import commands, provenance
from prefloop.config import PPOConfig, SampleConfig
from prefloop.files import read_rows, write_atomic
from prefloop.intervals import Interval, bootstrap

PASSES, MINIBATCHES, ANSWERS, JUDGED = 2, 2, 32, 250
RATES = {True: 3e-4, False: 1e-3}  # of the policy: the small one's, SmolLM2's adapters'
ITERATIONS = {True: 32, False: 24}
BASE: dict[str, Any] = {"rate": 1.0, "value_rate": 3.0, "answers": ANSWERS, "kl_coef": 0.1}
"""`value_rate` is the critic's learning rate in policy's; `rate` multiplies RATES. No warm-up."""
LARGE = {"answers": 64, "critic_warmup": 4}
GRID: dict[str, dict[str, Any]] = {
    "base": {},
    "from the policy": {"value_model": "policy"},
    "warm-up 2": {"critic_warmup": 2},
    "warm-up 4": {"critic_warmup": 4},
    "value lr 1x": {"value_rate": 1.0},
    "value lr 10x": {"value_rate": 10.0},
    "no value clip": {"cliprange_value": 1e9},
    "lambda 1": {"gae_lambda": 1.0},
    "normalised scores": {"normalize_scores": True},
    "whitened rewards": {"whiten_rewards": True},
    "EMA .05": {"ema_reference": 0.05},
    "64 answers": {"answers": 64},
    "64 answers, warm-up 4": LARGE,
    "64 answers, warm-up 4, 4 passes": LARGE | {"passes": 4},
    "64 answers, warm-up 4, value lr 1x": LARGE | {"value_rate": 1.0},
    "64 answers, warm-up 4, lambda .9": LARGE | {"gae_lambda": 0.9},
    "64 answers, warm-up 4, normalised": LARGE | {"normalize_scores": True},
    "64 answers, warm-up 4, EMA .05": LARGE | {"ema_reference": 0.05},
    "chosen": {"answers": 64, "value_rate": 1.0, "critic_warmup": None, "gae_lambda": 0.9},
    "RLOO": {"advantage": "rloo", "samples_per_prompt": 4},
}
"""`chosen` is what the demo has: PPO's defaults but for lambda."""


def main() -> None:
    """Run what is missing, then print all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.critic", description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["small-sentiment", "small-headlines"])
    parser.add_argument("--settings", nargs="+", default=list(GRID), choices=list(GRID))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--twenty", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/critic"))
    asked = parser.parse_args()
    if asked.twenty:
        asked.settings, asked.seeds = ["chosen"], range(10)
    torch.set_num_threads(asked.threads)
    found = []
    for name in asked.tasks:
        task = Task(name, asked.folder / name)
        task.prepare()
        for seed in asked.seeds:
            for setting in asked.settings:
                result = once(task, setting, seed, asked.folder / "results")
                print(line(result), flush=True)
                found.append(result)
    print(*table(found), sep="\n")


def once(task: Task, setting: str, seed: int, folder: Path) -> dict[str, Any]:
    """A run's numbers; made where they are not there yet."""
    name = f"{task.name}-{setting.replace(' ', '-')}-{seed}"
    path = folder / f"{name}.json"
    if not path.exists():
        before = judged(task, task.policy, task.folder / "sft-answers.jsonl")
        run, started = task.folder / name, provenance.cpu_seconds()
        settings = ppo(task, setting, seed, run)
        commands.ppo(settings)
        result = numbers(run) | {
            "task": task.name,
            "setting": setting,
            "seed": seed,
            "cpu_seconds": round(provenance.cpu_seconds() - started),
            "revision": provenance.revision(),
        }
        after = judged(task, str(run / "model"), run / "answers.jsonl")
        gain = [new - old for new, old in zip(after, before, strict=True)]
        for key, values in (("sft", before), ("judge", after), ("gain", gain)):
            result[key] = asdict(bootstrap(values))
        write_atomic(path, json.dumps(result, indent=2) + "\n")
        shutil.rmtree(run)  # half a gigabyte each
        gc.collect()
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def ppo(task: Task, setting: str, seed: int, output: Path) -> PPOConfig:
    """The settings of a run."""
    chosen = BASE | GRID[setting]
    lr = RATES[task.small] * chosen.pop("rate")
    value_rate, answers = chosen.pop("value_rate"), chosen.pop("answers")
    passes = chosen.pop("passes", PASSES)
    if chosen.get("advantage", "gae") == "gae":
        chosen = {"critic_warmup": 0, "value_lr": lr * value_rate} | chosen
    if chosen.get("value_model"):
        chosen["value_model"] = task.policy
    prompts = answers // MINIBATCHES // chosen.get("samples_per_prompt", 1)
    return PPOConfig(
        model=task.policy,
        data=str(task.rows("ppo")),
        output=output,
        reward_model=task.reward_model,
        seed=seed,
        max_steps=ITERATIONS[task.small] * passes * MINIBATCHES,
        ppo_epochs=passes,
        num_minibatches=MINIBATCHES,
        batch_size=prompts,
        max_new_tokens=NEW_TOKENS,
        lr=lr,
        max_length=128,
        save_minutes=0,
        **task.adapters,
        **chosen,
    )


def judged(task: Task, model: str, output: Path) -> list[float]:
    """The judge's scores of one answer to each held-out prompt."""
    if not output.exists():
        commands.sample(
            SampleConfig(
                model=model,
                data=str(task.rows("evaluation")),
                output=output,
                samples_per_prompt=1,
                max_prompts=JUDGED,
                max_new_tokens=NEW_TOKENS,
                max_concurrent=256,
            )
        )
    rows = [row for _, row in read_rows(output)]
    return task.judge([r["prompt"] for r in rows], [r["completions"][0] for r in rows])


def numbers(run: Path) -> dict[str, Any]:
    """What a run logged of its iterations."""
    rows = [row for _, row in read_rows(run / "metrics.jsonl") if "objective/scores" in row]
    names = {
        "explained_variance": "val/explained_variance",
        "score": "objective/scores",
        "kl": "objective/kl",
        "length": "length_mean",
    }
    curves = {key: [row.get(name) for row in rows] for key, name in names.items()}
    third = len(rows) - len(rows) // 3
    last = {
        key: fmean(known) if (known := [x for x in curve[third:] if x is not None]) else None
        for key, curve in curves.items()
    }
    return {"last_third": last, "curves": curves}


def line(result: Mapping[str, Any]) -> str:
    """A row of the table."""
    last, ev = result["last_third"], result["last_third"]["explained_variance"]
    sft, judge, gain = (Interval(**result[key]) for key in ("sft", "judge", "gain"))
    words = "apart" if judge.above(sft) else "above" if gain.mean > 0 else "BELOW"
    told = [result["task"], result["setting"], str(result["seed"])]
    told += ["–" if ev is None else f"{ev:.2f}", f"{last['score']:.2f}", f"{last['kl']:.1f}"]
    told += [f"{last['length']:.1f}", str(judge), str(gain), words, str(result["cpu_seconds"])]
    return "| " + " | ".join(told) + " |"


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown; explained variance, score, KL and length are means of the last third."""
    head = "task | setting | seed | EV | score | KL | tokens | judge | over SFT | SFT's | CPU s"
    return [f"| {head} |", "|---" * 11 + "|", *map(line, found)]


if __name__ == "__main__":
    main()
