"""A folder of tiny models and rows that every trainer can run on, and ways to run them."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prefloop import commands
from prefloop.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig, TrainingConfig
from prefloop.models.export import export_model
from prefloop.models.load import load_policy, load_scorer
from prefloop.models.model import LoadedModel
from prefloop.runs import Run
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
CONFIGS: dict[str, type[TrainingConfig]] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "ppo": PPOConfig,
}
ROWS = {"sft": "sft.jsonl", "reward": "rank.jsonl", "dpo": "rank.jsonl", "ppo": "prompts.jsonl"}
COMMON: dict[str, Any] = {
    "lr": 1e-3,
    "warmup": 0.0,
    "max_length": 128,
    "device": "cpu",
    "dtype": "float32",
}
SHORT: dict[str, Any] = {"max_new_tokens": 6, "max_concurrent": 8}
WORDS = "the a in boat took thin ant oath that bath".split()
TIMES = ("tokens_per_second",)
REWARDS = "tests.training.rewards"


def write_world(folder: Path, hidden: int = 32) -> None:
    """model/ and reference/ (policies), rm/ (scorer), rm_one/ and rm_two/ (adapters of scorers on
    model/), and rows of every kind and many lengths.
    """
    tokenizer = tiny_tokenizer(chat=False)
    for seed, name in enumerate(("model", "reference")):
        tiny_model("llama", seed=seed, hidden=hidden).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    export_model(load_scorer(str(folder / "model"), CPU, seed=1), folder / "rm")
    for seed, name in enumerate(("rm_one", "rm_two")):
        with torch.random.fork_rng(devices=[]):  # whichever tests went before
            torch.manual_seed(seed)
            scorer = load_scorer(str(folder / "model"), CPU, seed=seed, lora_rank=2)
        export_model(perturbed(scorer, seed=seed), folder / name)
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))

    asked = [text(1, 4) for _ in range(9)]
    shapes = [[[0], [1]], [[2], [0, 1]], [[1], [0], [3, 2]], [[0, 3], [1, 2]], [[2], [1], [0]]]
    rankings = []
    for number, prompt in enumerate(asked):
        tiers = shapes[number % len(shapes)]
        answers = [" " + text(1, 6) for _ in range(sum(map(len, tiers)))]
        rankings.append({"prompt": prompt, "completions": answers, "tiers": tiers})
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completions"][0], "rejected": r["completions"][1]}
        for r in rankings
    ]
    write_rows(folder / "sft.jsonl", [{"prompt": p, "completion": " " + text(1, 7)} for p in asked])
    write_rows(folder / "rank.jsonl", rankings)
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "prompts.jsonl", [{"prompt": p} for p in asked])


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(command: str, world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of a few seconds at most; `changes` override."""
    chosen = {"model": str(world / "model"), "data": str(world / ROWS[command])} | COMMON
    if command == "ppo":
        chosen |= SHORT
        if "reward_function" not in changes:
            chosen["reward_model"] = str(world / "rm")
    return chosen | {"output": output} | changes


def config(command: str, world: Path, output: Path, **changes: Any) -> Any:
    return CONFIGS[command](**settings(command, world, output, **changes))


def train(command: str, world: Path, output: Path, **changes: Any) -> Run:
    """Runs a trainer in this process."""
    run: Run = getattr(commands, command)(config(command, world, output, **changes))
    return run


def flags(settings: Mapping[str, Any]) -> list[str]:
    """The same settings on a command line."""
    words = []
    for name, value in settings.items():
        word = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{word}" if value else f"--no-{word}")
        else:
            words += [f"--{word}", str(value)]
    return words


def python(*words: str) -> list[str]:
    return [sys.executable, *words]


def lines(output: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """What a run logged, but for times."""
    rows = [json.loads(line) for line in (output / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run, its critic's too."""
    found = {}
    for path in sorted(output.glob("*model/*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.parent.name}/{name}"] = tensor
    assert found
    return found


def checkpoint(output: Path, step: int) -> Any:
    return torch.load(output / "checkpoints" / f"step-{step}" / "state.pt", weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    """Equal to the bit, but for times."""
    assert lines(one) == lines(other)
    for name in ("samples.jsonl",):
        if (one / name).exists():
            assert lines(one, name) == lines(other, name)
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_close_runs(
    one: Path, other: Path, tolerance: float = 1e-5, skip: Sequence[str] = ()
) -> None:
    """Equal to rounding: every metric of every step, and the final weights."""
    first, second = lines(one), lines(other)
    assert [line.keys() for line in first] == [line.keys() for line in second]
    for left, right in zip(first, second, strict=True):
        for name in left.keys() - set(skip):
            value = left[name]
            bound = tolerance * max(1.0, abs(value))
            assert abs(value - right[name]) <= bound, (left["step"], name, value, right[name])
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance)


def only_checkpoint(source: Path, target: Path, step: int) -> None:
    """A copy of a run as it stood when it was killed some time after saving `step`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("step-*", "*model"))
    name = f"checkpoints/step-{step}"
    shutil.copytree(source / name, target / name)
    record = json.loads((target / "run.json").read_text())
    (target / "run.json").write_text(json.dumps(record | {"status": "running"}))


def perturbed(model: LoadedModel, scale: float = 0.1, seed: int = 0) -> LoadedModel:
    """The model with its trainable weights moved in memory."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable():
            parameter += (
                scale
                * torch.randn(parameter.shape, generator=generator)
                * parameter.std(correction=0).clamp(min=0.1)
            )
    return model


def policy(world: Path, **options: Any) -> LoadedModel:
    return load_policy(str(world / "model"), CPU, **options)
