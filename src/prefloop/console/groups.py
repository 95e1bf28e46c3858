"""Which settings stand together in a command's help, and which of them most people need."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import NamedTuple


class Group(NamedTuple):
    """Settings under one heading, most needed first; `purpose` stands beside it."""

    title: str
    purpose: str
    names: tuple[str, ...]


REQUIRED, OWN = "Required", "Of this command alone"
GROUPS = (
    Group(
        "Rows",
        "what is read, and what becomes of rows that do not fit",
        (
            *("data", "eval_data", "eval_fraction", "chat", "max_length", "truncation"),
            *("bad_rows", "max_prompts", "template_args"),
        ),
    ),
    Group(
        "Sampling",
        "how answers are drawn",
        ("max_new_tokens", "temperature", "samples_per_prompt", "top_p", "top_k"),
    ),
    Group("Steps", "how long, and how much at once", ("epochs", "batch_size", "max_steps", "seed")),
    Group(
        "Optimiser",
        "how far a step goes",
        (
            *("lr", "lr_schedule", "warmup", "lr_floor", "optimizer", "weight_decay"),
            *("adam_beta1", "adam_beta2", "adam_eps", "max_grad_norm"),
        ),
    ),
    Group(
        "LoRA",
        "train small adapters in place of all weights",
        ("lora_rank", "lora_alpha", "lora_targets", "lora_dropout", "modules_to_save"),
    ),
    Group(
        "Memory and speed",
        "where it is computed, and in which types",
        (
            *("device", "dtype", "weights", "micro_batch_tokens", "gradient_checkpointing"),
            *("max_concurrent", "shard", "mesh"),
        ),
    ),
    Group(
        "Watching",
        "what another judge says of the policy as it learns",
        ("monitor", "monitor_data", "monitor_steps", "keep_best", "stop_on_hacking"),
    ),
    Group(
        "LLM judge",
        "how one behind an endpoint is asked",
        (
            *("judge_mode", "judge_prompt", "judge_args", "judge_concurrency", "judge_timeout"),
            *("judge_cache",),
        ),
    ),
    Group(
        "Record",
        "what is logged and saved, and what is gone on with",
        (
            *("resume", "log_every", "eval_every", "save_every", "save_minutes"),
            *("keep_checkpoints", "track"),
        ),
    ),
)
"""Of the settings that several commands share; all others are a command's own."""

FEW = 14
"""A command with at most so many settings shows them all."""
COMMON = {
    *("data", "eval_data", "eval_fraction", "chat", "max_length", "max_new_tokens", "temperature"),
    *("samples_per_prompt", "epochs", "batch_size", "max_steps", "seed", "lr", "lora_rank"),
    *("device", "dtype", "micro_batch_tokens", "output"),
    *("train_on", "loss", "beta", "reward_model", "reward_function", "advantage", "kl_coef"),
    *("prompt", "system", "against", "to_labels", "project", "mode", "guidelines", "need"),
    *("gold", "form", "consensus", "best_of", "monitor", "monitor_data"),
}
"""What `--help` shows of the commands with more; `--help-all` shows the rest."""


def is_required(field: Field[object]) -> bool:
    """Whether a setting has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def grouped(config: type, whole: bool) -> list[tuple[Group, list[Field[object]]]]:
    """The settings of a command under their headings, required ones first; all, or common ones."""
    known = {field.name: field for field in fields(config)}
    whole = whole or len(known) <= FEW
    required = tuple(name for name, field in known.items() if is_required(field))
    shared = {name for group in GROUPS for name in group.names}
    own = tuple(name for name in known if name not in shared)
    groups = (
        Group(REQUIRED, "nothing starts without these", required),
        Group(OWN, "", own),
        *GROUPS,
    )
    found = []
    for group in groups:
        names = [name for name in group.names if name in known]
        if group.title != REQUIRED:
            names = [n for n in names if n not in required and (whole or n in COMMON)]
        if names:
            found.append((group, [known[name] for name in names]))
    return found
