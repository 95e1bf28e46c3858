"""What is run: the four trainers on one rank and two, and a pipeline, with tiny models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from prefloop.resume import checkpoints, flaw
from tests.training.small import flags, settings

TIMES = ("tokens_per_second",)
SAVES = {"save_every": 2, "keep_checkpoints": 2}
ROLLOUTS = {"batch_size": 3, "ppo_epochs": 2, "num_minibatches": 2, "kl_target": 0.01}
RUNS: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 2, "epochs": 2.0, "eval_fraction": 0.2, "eval_every": 2},
    "reward": {"batch_size": 2, "epochs": 2.0, "lora_rank": 2},
    "dpo": {"batch_size": 2, "epochs": 2.0},
    "ppo": ROLLOUTS | {"save_every": 3, "normalize_scores": True},
}


@dataclass(frozen=True)
class Case:
    """A command on so many ranks."""

    command: str
    ranks: int

    @property
    def name(self) -> str:
        """`sft` or `sft-2`."""
        return self.command if self.ranks == 1 else f"{self.command}-{self.ranks}"

    def words(self, world: Path, output: Path) -> list[str]:
        """Its command line."""
        if self.command != "run":
            changes = SAVES | RUNS[self.command]
            return [self.command, *flags(settings(self.command, world, output, **changes))]
        return ["run", str(_pipeline(world)), "--output", str(output)]


CASES = [  # in an order in which the first few are unlike
    Case("sft", 1),
    Case("dpo", 2),
    Case("run", 1),
    Case("ppo", 1),
    Case("sft", 2),
    Case("reward", 1),
    Case("ppo", 2),
    Case("dpo", 1),
    Case("reward", 2),
]


def _pipeline(world: Path) -> Path:
    """sft and reward, PPO between them, and what came of it sampled."""
    path = world / "pipeline.yaml"
    stages = []
    for command in ("sft", "reward", "ppo"):
        own = settings(command, world, world, **SAVES | RUNS[command] | {"epochs": 1.0})
        del own["output"]
        if command == "ppo":
            own |= {"model": "${sft}", "reward_model": "${reward}"}
        stages.append({"name": command, "command": command, "settings": own})
    sampled = {"model": "${ppo}", "data": str(world / "prompts.jsonl"), "max_new_tokens": 6}
    sampled |= {"max_length": 64, "device": "cpu", "dtype": "float32"}
    stages.append({"name": "sample", "command": "sample", "settings": sampled})
    path.write_text(json.dumps({"stages": stages}))
    return path


def result(output: Path) -> dict[str, Any]:
    """What must be the same to the bit, by file: weights, rows, and lines but for times."""
    found: dict[str, Any] = {}
    for path in sorted(output.rglob("*")):
        name = str(path.relative_to(output))
        if path.suffix == ".safetensors":
            found[name] = path.read_bytes().hex()
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    return found


def assert_whole(output: Path) -> None:
    """Nothing that has its name is half written; a last line may be cut short. What was found
    damaged is kept as it was.
    """
    for record in output.rglob("checkpoints"):
        for path in checkpoints(record.parent):
            assert flaw(path) == "", path
    for path in output.rglob("*"):
        if any(part.startswith((".", "damaged-")) for part in path.relative_to(output).parts):
            continue
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            *lines, _ = path.read_text(errors="replace").split("\n")
            for line in lines:
                json.loads(line)
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as weights:
                assert list(weights.keys())


def assert_finished(output: Path) -> None:
    """Every run says so, and nothing is left over of one that was killed."""
    records = list(output.rglob("run.json"))
    assert records
    for record in records:
        assert json.loads(record.read_text())["status"] == "finished", record
    left = [path for path in output.rglob(".*") if path.name != ".metadata"]  # of slices
    assert not left, left
