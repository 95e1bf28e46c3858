"""A short run of every loss, for whatever must hold for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training.small import train

# With a large epsilon AdamW's update is nearly linear in the gradient, so that weights which agree
# after some steps mean gradients that agree, the smallest too.
LINEAR: dict[str, Any] = {"adam_eps": 1.0, "lr": 0.05, "max_grad_norm": 100.0, "batch_size": 4}
ROLLOUTS = {"batch_size": 3, "ppo_epochs": 2, "max_steps": 3, "eval_data": None}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "sft-all": ("sft", {"train_on": "all"}),
    "bradley-terry": ("reward", {}),
    "bradley-terry-pair": ("reward", {"normalize": "pair"}),
    "bradley-terry-center": ("reward", {"center_coefficient": 0.1}),
    "plackett-luce": ("reward", {"loss": "plackett-luce"}),
    "rao-kupper": ("reward", {"loss": "rao-kupper"}),
    "davidson-pair": ("reward", {"loss": "davidson", "normalize": "pair"}),
    "dpo-sigmoid": ("dpo", {"label_smoothing": 0.1, "sft_coefficient": 0.5}),
    "dpo-robust": ("dpo", {"loss": "robust", "label_smoothing": 0.1}),
    "dpo-ipo": ("dpo", {"loss": "ipo"}),
    "dpo-hinge": ("dpo", {"loss": "hinge"}),
    "dpo-apo-zero": ("dpo", {"loss": "apo-zero"}),
    "dpo-sigmoid-norm": ("dpo", {"loss": "sigmoid-norm"}),
    "dpo-simpo": ("dpo", {"loss": "simpo"}),
    "dpo-orpo": ("dpo", {"loss": "orpo"}),
    "dpo-kto": ("dpo", {"loss": "kto", "data": "pairs.jsonl", "eval_data": "pairs.jsonl"}),
    "dpo-plackett-luce": ("dpo", {"loss": "plackett-luce"}),
    "ppo-gae": ("ppo", ROLLOUTS),
    "ppo-whiten": ("ppo", ROLLOUTS | {"whiten_rewards": True, "kl_target": 0.05}),
    "ppo-warmup": ("ppo", ROLLOUTS | {"critic_warmup": 1, "bootstrap_cut": True}),
    "ppo-rloo": (
        "ppo",
        ROLLOUTS | {"advantage": "rloo", "samples_per_prompt": 2, "ema_reference": 0.5},
    ),
    "ppo-grpo": ("ppo", ROLLOUTS | {"advantage": "grpo", "samples_per_prompt": 3}),
    "ppo-dr-grpo": (
        "ppo",
        ROLLOUTS
        | {"advantage": "dr-grpo", "samples_per_prompt": 2}
        | {"policy_norm": "constant", "clip_high": 0.28},
    ),
    "ppo-minibatches": ("ppo", ROLLOUTS | {"num_minibatches": 3, "normalize_scores": True}),
    "ppo-one-base": ("ppo", ROLLOUTS | {"lora_rank": 2, "reward_model": ["rm_one"]}),
    "ppo-several": (
        "ppo",
        ROLLOUTS | {"lora_rank": 2, "reward_model": ["rm_one", "rm_two"], "ema_reference": 0.5},
    ),
    "ppo-ptx": ("ppo", ROLLOUTS | {"ptx_coef": 0.5, "sft_data": "sft.jsonl"}),
}


def run_case(name: str, world: Path, output: Path, **more: Any) -> None:
    """The rows are also the held-out rows: evaluation sums as training does."""
    command, own = CASES[name]
    evaluated = {"eval_data": "sft.jsonl" if command == "sft" else "rank.jsonl"}
    changes = LINEAR | evaluated | own | more
    if command == "dpo" and own.get("loss") not in ("simpo", "orpo"):
        changes["ref_model"] = "reference"  # with the default one, step 1's margins are rounding
    for key in ("data", "eval_data", "sft_data", "ref_model"):
        if changes.get(key):
            changes[key] = str(world / changes[key])
    if scorers := changes.get("reward_model"):
        changes["reward_model"] = tuple(str(world / name) for name in scorers)
    train(command, world, output, **changes)
