"""Writes fixtures/ppo.json with the numbers of TRL 1.12's own PPOTrainer, the last TRL with PPO.

Runs in a venv of its own (see README.md); imports no prefloop. The trainer keeps everything in
local variables of `train`, so they are read from its frame as the optimiser steps.
"""

from __future__ import annotations

import inspect
import tempfile
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from tests.parity import models, rows

ROLLOUT = (
    *("logprobs", "ref_logprobs", "kl", "values", "scores"),
    *("rewards", "advantages", "returns"),
)
EPOCHS = {
    "approxkl": "approxkl_stats",
    "clipfrac": "pg_clipfrac_stats",
    "policy_loss": "pg_loss_stats",
    "value_loss": "vf_loss_stats",
    "value_clipfrac": "vf_clipfrac_stats",
    "ratio": "ratio_stats",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "stop": {"stop_token": "eos"},
    "length": {},
    "whitened": {"whiten_rewards": True},
    "discounted": {
        **{"gamma": 0.9, "lam": 0.8, "kl_coef": 0.1, "vf_coef": 0.5},
        **{"cliprange": 0.1, "cliprange_value": 0.3},
    },
}


def train_locals() -> dict[str, Any]:
    """Local variables of `PPOTrainer.train`, from anywhere below it."""
    frame = inspect.currentframe()
    while frame is not None and "padding_mask_p1" not in frame.f_locals:
        frame = frame.f_back
    assert frame is not None
    return frame.f_locals


class Spy(TrainerCallback):
    """Copies the rollout at the first optimiser step and what each step sees."""

    def __init__(self) -> None:
        self.rollout: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []

    def optimizer_step(self, *_: Any) -> None:
        seen = train_locals()
        if not self.rollout:
            self.rollout = {name: seen[name].tolist() for name in ROLLOUT}
            self.rollout["last"] = seen["sequence_lengths"].tolist()  # index of the last token
            context = seen["context_length"]
            self.rollout["prompts"] = [
                [t for t in row[:context] if t] for row in seen["query_responses"].tolist()
            ]
            self.rollout["answers"] = [
                row[: last + 1]
                for row, last in zip(seen["responses"].tolist(), self.rollout["last"], strict=True)
            ]
            assert all(0 not in answer for answer in self.rollout["answers"]), "pad was sampled"
        back = torch.as_tensor(seen["micro_batch_inds"]).argsort()
        self.steps.append(
            {
                "log_probs": seen["new_logprobs"][back].tolist(),
                "values": seen["vpred"][back].tolist(),
                "policy_grad_norm": models.grad_norm(seen["model"].policy),
                "critic_grad_norm": models.grad_norm(seen["model"].value_model),
            }
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        seen = train_locals()
        for number, step in enumerate(self.steps):
            step.update({k: seen[v].flatten()[number].item() for k, v in EPOCHS.items()})


def ppo(**options: Any) -> dict[str, Any]:
    """One iteration of two epochs over eight sampled answers."""
    transformers.set_seed(0)  # PPOTrainer leaves NumPy's, which orders the rows, unset
    tokenizer = models.text_tokenizer()
    tokenizer.padding_side = "left"
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=len(rows.PROMPTS),
        total_episodes=len(rows.PROMPTS),
        num_ppo_epochs=2,
        num_sample_generations=0,
        response_length=10,
        temperature=0.7,
        learning_rate=3e-4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=0,
        **options,
    )
    spy = Spy()
    trainer = PPOTrainer(
        config,
        tokenizer,
        models.causal_lm(models.POLICY),
        models.causal_lm(models.REFERENCE),
        models.scorer(models.SCORER),
        Dataset.from_dict({"input_ids": [tokenizer(p)["input_ids"] for p in rows.PROMPTS]}),
        models.scorer(models.CRITIC),
        callbacks=[spy],
    )
    optimizer: torch.optim.Optimizer = trainer.optimizer.optimizer
    optimizer.register_step_pre_hook(spy.optimizer_step)
    trainer.train()
    logged = trainer.state.log_history[0]
    metrics = {k: v for k, v in logged.items() if "/" in k}
    return {"options": options, "rollout": spy.rollout, "epochs": spy.steps, "metrics": metrics}


def rounded(x: Any) -> Any:
    """Floats as float32 prints them: nine digits say all there is."""
    if isinstance(x, float):
        return float(f"{x:.9g}")
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list | Tensor) else x


def main() -> None:
    content = {
        "versions": {
            "trl": trl.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "policy": models.fingerprint(models.causal_lm(models.POLICY)),
        "reference": models.fingerprint(models.causal_lm(models.REFERENCE)),
        "scorer": models.fingerprint(models.scorer(models.SCORER)),
        "critic": models.fingerprint(models.scorer(models.CRITIC)),
    }
    for name, options in VARIANTS.items():
        content[name] = rounded(ppo(**options))
    k3 = ppo(kl_estimator="k3")["rollout"]
    content["k3"] = rounded({name: k3[name] for name in ("logprobs", "ref_logprobs", "kl")})
    models.write("ppo", content)


if __name__ == "__main__":
    main()
