"""TRL 1.16's side, in a venv of its own: its trainers, which take one optimiser step a turn.

`python -m benchmarks.trl_side WORK ROWS MODELS DTYPE FORM`; FORM is `as-it-comes`, or `best` (no
recomputation of activations; DPO: reference log-probs computed beforehand; SFT: packed), or for DPO
`best-first` (no recomputation, the reference reads every row).
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)

from benchmarks.meter import Meter, tell, wait
from benchmarks.work import LORA_ALPHA, LORA_RANK, WORKS, Work, read_texts, trl_settings


class Turns(TrainerCallback):
    """Waits before each optimiser step, and tells of it when its loss is logged."""

    def __init__(self, tokens: int) -> None:
        self.meter, self.tokens, self.begun = Meter(), tokens, False
        self.found: dict[str, float] = {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.begun:
            tell(ready=True)
            self.begun = True
        wait()
        self.meter.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.found = self.meter.stop()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            same = {"loss": float(logs["loss"])}
            if "logps/chosen" in logs:
                same["logps"] = float(logs["logps/chosen"])
            tell(same=same, tokens=self.tokens, **self.found)


def main(name: str, path: str, models: str, dtype: str, form: str) -> None:
    """Build the trainer and train for ever."""
    work, policy = WORKS[name], f"{models}/policy"
    rows = read_texts(path)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = "<|endoftext|>"  # not the stop token
    eos = tokenizer.eos_token
    settings = trl_settings(dtype) | {"max_steps": 10_000, "dataloader_num_workers": 0}
    if form != "as-it-comes":
        settings["gradient_checkpointing"] = False
    model: Any
    if work.kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(
            policy, num_labels=1, dtype=torch.float32
        )
        generator = torch.Generator().manual_seed(0)
        std = (model.score.in_features + 1) ** -0.5
        torch.nn.init.normal_(model.score.weight, std=std, generator=generator)
        model.config.pad_token_id = tokenizer.pad_token_id
    else:
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    tokens = sum(
        len(tokenizer(row["prompt"] + answer + eos)["input_ids"])
        for row in rows
        for answer in row["completions"]
    )
    trainer = trainer_of(work, rows, model, tokenizer, settings, f"{models}/reference", form)
    trainer.add_callback(Turns(tokens))
    trainer.train()


def trainer_of(
    work: Work,
    rows: list[dict[str, Any]],
    model: Any,
    tokenizer: Any,
    settings: dict[str, Any],
    reference: str,
    form: str,
) -> Any:
    """All rows make one optimiser step; rankings become all of their pairs."""
    if work.kind == "sft":
        return sft(rows, model, tokenizer, settings, packed=form == "best")
    pairs = [
        {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}
        for row in rows
        for chosen, rejected in itertools.combinations(row["completions"], 2)
    ]
    data = Dataset.from_list(pairs)
    if work.kind == "reward":
        size = min(4, len(pairs))
        config: Any = trl.RewardConfig(
            **settings,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=len(pairs) // size,
        )
        return trl.RewardTrainer(model, config, train_dataset=data, processing_class=tokenizer)
    config = trl.DPOConfig(
        **settings,
        per_device_train_batch_size=len(pairs),
        precompute_ref_log_probs=form == "best",
    )
    lora = LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return trl.DPOTrainer(
        model,
        AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32),
        config,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora if work.lora else None,
    )


def sft(
    rows: list[dict[str, Any]], model: Any, tokenizer: Any, settings: dict[str, Any], packed: bool
) -> Any:
    """Padded in one batch, or packed to 512 tokens, where as many as there are make the step."""
    data = [{"prompt": r["prompt"], "completion": r["completions"][0]} for r in rows]
    options: dict[str, Any] = {"per_device_train_batch_size": len(rows)}
    if packed:
        options = {"packing": True, "max_length": 512, "per_device_train_batch_size": 1}
    config: Any = trl.SFTConfig(**settings, **options)
    trainer: Any = trl.SFTTrainer(
        model, config, train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    if packed:
        trainer.args.gradient_accumulation_steps = len(trainer.train_dataset)
        trainer.accelerator.gradient_accumulation_steps = len(trainer.train_dataset)
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
