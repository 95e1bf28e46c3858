"""Writes fixtures/{sft,reward,preference,kto}.json with the numbers of TRL 1.16's own trainers.

Runs in a venv of its own (see README.md); imports no prefloop.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tests.parity import models, rows

STEP = {
    "max_steps": 1,
    "logging_steps": 1,
    "learning_rate": 1e-6,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 0,
}
TIMES = ("train_", "epoch", "learning_rate", "total_flos", "step", "num_tokens", "logits/")


def settings(kind: Callable[..., Any], size: int, **options: Any) -> Any:
    """A TRL config for one step over `size` rows."""
    return kind(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size, **{**STEP, **options}
    )


def one_step(trainer: Any) -> dict[str, float]:
    """Loss, gradient norm and metrics of the trainer's first optimiser step."""
    trainer.train()
    first = trainer.state.log_history[0]
    return {k: v for k, v in first.items() if not k.startswith(TIMES)}


def of_each_row(trainer: Any) -> list[dict[str, float]]:
    """Loss and metrics of each row alone, before any step."""
    out = []
    trainer.model.train()
    metrics = getattr(trainer, "_metrics", None)
    metrics = trainer._stored_metrics if metrics is None else metrics
    for number in range(len(trainer.train_dataset)):
        inputs = trainer.data_collator([trainer.train_dataset[number]])
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, inputs)
        found = {k: v[-1] for k, v in metrics["train"].items() if not k.startswith(TIMES)}
        out.append({"loss": loss.item(), **found})
        metrics["train"].clear()
    return out


def ids(dataset: Dataset, columns: Iterable[str]) -> list[dict[str, list[int]]]:
    """The token ids that TRL made of each row."""
    return [{column: list(row[column]) for column in columns} for row in dataset]


def sft() -> dict[str, Any]:
    """Plain text, its answers alone or all of it, and chats; in one micro-batch and in three."""
    chats = [{"prompt": c["prompt"], "completion": c["chosen"]} for c in rows.CHATS]
    out: dict[str, Any] = {}
    for name, data, tokenizer, options in (
        ("text", rows.DEMONSTRATIONS, models.text_tokenizer(), {}),
        ("all", rows.DEMONSTRATIONS, models.text_tokenizer(), {"completion_only_loss": False}),
        ("chat", chats, models.chat_tokenizer(), {}),
        (
            "conversation",
            rows.CONVERSATIONS,
            models.marked_chat_tokenizer(),
            {"assistant_only_loss": True},
        ),
    ):

        def trainer(
            size: int, data: Any = data, tokenizer: Any = tokenizer, options: Any = options
        ) -> trl.SFTTrainer:
            steps = len(data) // size
            return trl.SFTTrainer(
                models.causal_lm(models.POLICY),
                settings(trl.SFTConfig, size, gradient_accumulation_steps=steps, **options),
                train_dataset=Dataset.from_list([dict(row) for row in data]),
                processing_class=tokenizer,
            )

        whole = trainer(len(data))
        out[name] = {
            "tokens": ids(whole.train_dataset, ("input_ids", "labels")),
            "rows": of_each_row(whole),
            "step": one_step(whole),
            "step_of_3_micro_batches": one_step(trainer(2)),
        }
    return {"policy": models.fingerprint(models.causal_lm(models.POLICY)), **out}


def reward() -> dict[str, Any]:
    """Plain, with a margin column, with the centring term, with pad = EOS."""
    out: dict[str, Any] = {"scorer": models.fingerprint(models.scorer(models.SCORER))}
    with_margin = [
        {**row, "margin": p.margin} for row, p in zip(rows.PREFERENCES, rows.PAIRS, strict=True)
    ]
    pad_is_eos = models.text_tokenizer()
    pad_is_eos.pad_token = pad_is_eos.eos_token
    for name, data, coefficient, tokenizer in (
        ("plain", rows.PREFERENCES, None, models.text_tokenizer()),
        ("margin", with_margin, None, models.text_tokenizer()),
        ("centring", rows.PREFERENCES, 0.01, models.text_tokenizer()),
        ("pad_is_eos", rows.PREFERENCES, None, pad_is_eos),
    ):
        trainer = trl.RewardTrainer(
            models.scorer(models.SCORER),
            settings(trl.RewardConfig, len(data), center_rewards_coefficient=coefficient),
            train_dataset=Dataset.from_list([dict(row) for row in data]),
            processing_class=tokenizer,
        )
        out["tokens"] = ids(trainer.train_dataset, ("chosen_ids", "rejected_ids"))
        out[name] = {"rows": of_each_row(trainer), "step": one_step(trainer)}
    return out


DPO = {
    "sigmoid": {"loss_type": ["sigmoid"]},
    "sigmoid_smoothed": {"loss_type": ["sigmoid"], "label_smoothing": 0.1},  # ignored by TRL
    "sigmoid_sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "ipo": {"loss_type": ["ipo"]},
    "hinge": {"loss_type": ["hinge"]},
}
# Alone in its batch a row has nothing to be sorted with, and aot is conservative DPO.
CDPO = {"loss_type": ["aot"], "label_smoothing": 0.1}
CPO = {
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.5, "beta": 2.0},
    "simpo_sft": {"loss_type": "simpo", "cpo_alpha": 0.5, "simpo_gamma": 0.5, "beta": 2.0},
    "cdpo_without_reference": {"loss_type": "sigmoid", "cpo_alpha": 0.0, "label_smoothing": 0.1},
}


def preference() -> dict[str, Any]:
    """Every pairwise loss, in text; DPO in chats too."""
    out: dict[str, Any] = {
        "policy": models.fingerprint(models.causal_lm(models.POLICY)),
        "reference": models.fingerprint(models.causal_lm(models.REFERENCE)),
    }
    text = Dataset.from_list([dict(row) for row in rows.PREFERENCES])
    everything = len(text)

    def dpo(
        data: Dataset, tokenizer: Any, size: int = everything, **options: Any
    ) -> trl.DPOTrainer:
        steps = everything // size
        return trl.DPOTrainer(
            models.causal_lm(models.POLICY),
            models.causal_lm(models.REFERENCE),
            settings(trl.DPOConfig, size, beta=0.1, gradient_accumulation_steps=steps, **options),
            train_dataset=data,
            processing_class=tokenizer,
        )

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    for name, options in DPO.items():
        trainer = dpo(text, models.text_tokenizer(), **options)
        out["tokens"] = ids(trainer.train_dataset, columns)
        out[name] = {"options": options, "rows": of_each_row(trainer), "step": one_step(trainer)}
    alone = dpo(text, models.text_tokenizer(), size=1, **CDPO)
    out["cdpo"] = {"options": CDPO, "rows": of_each_row(alone), "step": one_step(alone)}
    chat = dpo(Dataset.from_list(list(rows.CHATS)), models.chat_tokenizer())
    out["chat"] = {
        "tokens": ids(chat.train_dataset, columns),
        "rows": of_each_row(chat),
        "step": one_step(chat),
    }
    for name, options in CPO.items():
        trainer = CPOTrainer(
            models.causal_lm(models.POLICY),
            settings(CPOConfig, everything, **{"beta": 0.1, **options}),
            train_dataset=text,
            processing_class=models.text_tokenizer(),
        )
        out[name] = {"options": options, "rows": of_each_row(trainer), "step": one_step(trainer)}
    trainer = ORPOTrainer(
        models.causal_lm(models.POLICY),
        settings(ORPOConfig, everything, beta=0.1),
        train_dataset=text,
        processing_class=models.text_tokenizer(),
    )
    out["orpo"] = {"rows": of_each_row(trainer), "step": one_step(trainer)}
    return out


def kto() -> dict[str, Any]:
    """Unpaired rows; the KL estimate comes from each prompt with the answer of the row before."""
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    trainer = trl.KTOTrainer(
        models.causal_lm(models.POLICY),
        models.causal_lm(models.REFERENCE),
        settings(trl.KTOConfig, len(rows.UNPAIRED), beta=0.1, **weights),
        train_dataset=Dataset.from_list([dict(row) for row in rows.UNPAIRED]),
        processing_class=models.text_tokenizer(),
    )
    tokens = ids(trainer.train_dataset, ("prompt_ids", "completion_ids", "KL_completion_ids"))
    return {"options": weights, "tokens": tokens, "step": one_step(trainer)}


def main() -> None:
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    for make in (sft, reward, preference, kto):
        models.write(make.__name__, {"versions": versions, **copy.deepcopy(make())})


if __name__ == "__main__":
    main()
