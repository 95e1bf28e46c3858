"""Writes TRL 1.16's own numbers to fixtures/{sft,reward,preference,kto,grpo}.json.

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
    "apo_zero": {"loss_type": ["apo_zero"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
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


GRPO = {
    "dr_grpo": {"loss_type": "dr_grpo"},
    "clip_higher": {"loss_type": "bnpo", "epsilon_high": 0.28},  # divides by all tokens
    "dr_grpo_clip_higher": {"loss_type": "dr_grpo", "epsilon_high": 0.28},
}
MOST_TOKENS = 24


def grpo() -> dict[str, Any]:
    """Clipped losses of given answers whose old log-probs lie on both sides of both limits."""
    tokenizer = models.text_tokenizer()
    texts = [p["chosen"] for p in rows.PREFERENCES]
    prompts = [tokenizer(p["prompt"])["input_ids"] for p in rows.PREFERENCES]
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width, length = max(map(len, prompts)), max(map(len, answers))
    pad, out = tokenizer.pad_token_id, {}
    left = [[pad] * (width - len(p)) + p for p in prompts]
    right = [a + [pad] * (length - len(a)) for a in answers]
    inputs = {
        "prompt_ids": torch.tensor(left),
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
        "completion_ids": torch.tensor(right),
        "completion_mask": torch.tensor([[1] * len(a) + [0] * (length - len(a)) for a in answers]),
        "advantages": torch.tensor([(-1.0) ** i * (1 + i / 4) for i in range(len(answers))]),
    }
    for name, options in GRPO.items():
        trainer = trl.GRPOTrainer(
            models.causal_lm(models.POLICY),
            lambda completions, **_: [0.0] * len(completions),
            settings(
                trl.GRPOConfig,
                len(answers),
                num_generations=len(answers),
                max_completion_length=MOST_TOKENS,
                beta=0.0,
                **options,
            ),
            train_dataset=Dataset.from_list([{"prompt": p["prompt"]} for p in rows.PREFERENCES]),
            processing_class=tokenizer,
        )
        trainer.current_gradient_accumulation_steps = 1
        model = trainer.model.train()
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            new = trainer._get_per_token_logps_and_entropies(model, ids, mask, length)[0]
        place = torch.arange(new.numel(), dtype=torch.float32).view_as(new)
        old = new + 0.4 * torch.sin(place)  # ratios from .67 to 1.49
        loss = trainer._compute_loss(model, inputs | {"old_per_token_logps": old})
        loss.backward()
        out[name] = {
            "options": options,
            "loss": loss.item(),
            "grad_norm": models.grad_norm(model),
        }
    rounded = [[float(f"{x:.9g}") for x in row] for row in old.tolist()]
    given = {"prompts": prompts, "answers": answers, "old": rounded, "most_tokens": MOST_TOKENS}
    given["advantages"] = inputs["advantages"].tolist()
    return {"policy": models.fingerprint(models.causal_lm(models.POLICY)), "given": given, **out}


def main() -> None:
    versions = {"trl": trl.__version__, "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    for make in (sft, reward, preference, kto, grpo):
        models.write(make.__name__, {"versions": versions, **copy.deepcopy(make())})


if __name__ == "__main__":
    main()
