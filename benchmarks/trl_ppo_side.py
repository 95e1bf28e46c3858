"""TRL 1.12's side of PPO, the last TRL with it, in a venv of its own: one iteration a turn.

`python -m benchmarks.trl_ppo_side WORK ROWS MODELS DTYPE FORM`; FORM is `as-it-comes`, with a
setting `bf16` that does nothing, or `best`: no recomputation, in bfloat16 autocast around what is
trained, as `accelerate launch` sets it, and reference and reward model in bfloat16 themselves.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.meter import Meter, tell, wait
from benchmarks.work import PPO_EPOCHS, WORKS, read_texts, stop_ids, trl_settings


class Turns(TrainerCallback):
    """Waits before each iteration, and tells of it when it ends."""

    def __init__(self, tokens: int) -> None:
        self.meter, self.tokens = Meter(), tokens
        self.alike: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        tell(ready=True)
        wait()
        self.meter.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.alike = {"score": logs["objective/scores"], "kl": logs["objective/kl"]}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        found = self.meter.stop()
        tell(same={"tokens": self.tokens}, alike=self.alike, tokens=self.tokens, **found)
        wait()
        self.meter.start()


def main(name: str, path: str, models: str, dtype: str, form: str) -> None:
    """Build the trainer and train for ever; without a stop token all answers have full length."""
    work, rows = WORKS[name], read_texts(path)
    turns = Turns(len(rows) * work.answer[1])
    truncate = ppo_trainer.truncate_response

    def counted(stop: int, pad: int, responses: torch.Tensor) -> torch.Tensor:
        cut: torch.Tensor = truncate(stop, pad, responses)
        turns.tokens = int((cut != pad).sum())
        return cut

    ppo_trainer.truncate_response = counted
    tokenizer = AutoTokenizer.from_pretrained(f"{models}/policy", padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"
    best = form == "best"
    if best and dtype == "bfloat16":
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    config = PPOConfig(
        **trl_settings(dtype),
        per_device_train_batch_size=len(rows),
        total_episodes=len(rows) * 10_000,
        num_ppo_epochs=PPO_EPOCHS,
        num_sample_generations=0,
        response_length=work.answer[1],
        temperature=1.0,
        gradient_checkpointing=not best,
        stop_token_id=next(iter(stop_ids(work, tokenizer)), None),
    )
    fixed = getattr(torch, dtype) if best else torch.float32

    def scorer(weights: torch.dtype) -> Any:
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            f"{models}/scorer", num_labels=1, dtype=weights
        )
        return model

    trainer = PPOTrainer(
        config,
        tokenizer,
        AutoModelForCausalLM.from_pretrained(f"{models}/policy", dtype=torch.float32),
        AutoModelForCausalLM.from_pretrained(f"{models}/reference", dtype=fixed),
        scorer(fixed),
        Dataset.from_dict({"input_ids": [tokenizer(r["prompt"])["input_ids"] for r in rows]}),
        scorer(torch.float32),
        callbacks=[turns],
    )
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
