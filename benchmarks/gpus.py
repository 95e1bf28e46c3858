"""Which GPU a run needs: the plans of known models, as the table of docs/gpus.md.

Nothing is downloaded and nothing computed: the models are their numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from prefloop.config import PPOConfig, TrainingConfig
from prefloop.recipes.plan_table import COMMANDS, work_of
from prefloop.training.bare_models import Role
from prefloop.training.planned_roles import roles_of
from prefloop.training.planning import GIB, SHARE, Plan, full_plan

CUDA = torch.device("cuda")
CARDS = (24, 48, 80)
MODELS: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    # width, layers, heads, key heads, inner width, vocabulary; whether the head is tied
    "Qwen2.5-0.5B": (Qwen2Config, (896, 24, 14, 2, 4864, 151936), True),
    "Llama-3.2-1B": (LlamaConfig, (2048, 16, 32, 8, 8192, 128256), True),
    "Llama-3.2-3B": (LlamaConfig, (3072, 28, 24, 8, 8192, 128256), True),
    "Llama-3.1-8B": (LlamaConfig, (4096, 32, 32, 8, 14336, 128256), False),
    "Qwen2.5-14B": (Qwen2Config, (5120, 48, 40, 8, 13824, 152064), False),
    "Qwen2.5-32B": (Qwen2Config, (5120, 64, 40, 8, 27648, 152064), False),
    "Llama-3.1-70B": (LlamaConfig, (8192, 80, 64, 8, 28672, 128256), False),
}
FORMS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, bfloat16, 8-bit AdamW": {"weights": "bfloat16", "optimizer": "adamw8bit"},
    "LoRA": {"lora_rank": 16},
    "LoRA on 4 bits": {"lora_rank": 16, "weights": "nf4"},
}
LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
COMMON: dict[str, Any] = {
    "data": "rows",
    "output": Path("run"),
    "device": "cuda",
    "dtype": "bfloat16",
    "max_length": 1024,
    "micro_batch_tokens": 2048,
    "gradient_checkpointing": True,
}


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """The table, printed and returned; its plans have a type of their own, and ask no processor."""
    print("| model | command | " + " | ".join(FORMS) + " |")
    print("|---|---|" + "---:|" * len(FORMS))
    return {"gpus": [row for model in MODELS for row in rows_of(model)]}


def rows_of(model: str) -> list[dict[str, Any]]:
    """A model's lines, printed."""
    rows = []
    for command in COMMANDS:
        row: dict[str, Any] = {"model": model, "command": command}
        for form in FORMS:
            row[form] = plan_of(model, command, form).peak / GIB
        told = " | ".join(_cell(row[form]) for form in FORMS)
        print(f"| {model} | {command} | {told} |", flush=True)
        rows.append(row)
    return rows


def plan_of(model: str, command: str, form: str) -> Plan:
    """Of a run on one GPU."""
    own: dict[str, Any] = {"model": model} | FORMS[form]
    if command == "ppo":
        own |= {"reward_model": model, "max_new_tokens": 512}
    config: TrainingConfig = COMMANDS[command](**COMMON | own)
    assert isinstance(config, PPOConfig) == (command == "ppo")
    roles = roles_of(config, CUDA, config_of)
    if command == "ppo" and config.lora_rank:
        roles = on_one_base(roles, config.lora_rank)
    return full_plan(work_of(config), config, roles, CUDA)


def on_one_base(roles: list[Role], rank: int) -> list[Role]:
    """As of a reward model that is an adapter of the policy's base, and a critic that begins so."""
    adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR)
    return [
        role._replace(on="policy", adapter=None if role.trained else adapter)
        if role.scorer
        else role
        for role in roles
    ]


def config_of(model: str) -> PretrainedConfig:
    """The configuration of these numbers, stored in bfloat16."""
    kind, (width, layers, heads, key_heads, inner, vocabulary), tied = MODELS[model]
    found: PretrainedConfig = kind(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=tied,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    return found


def _cell(gib: float) -> str:
    """GiB, and the smallest card that holds them."""
    card = next((f"**{card} GB**" for card in CARDS if gib <= SHARE["cuda"] * card), "—")
    return f"{gib:.0f} {card}" if gib >= 10 else f"{gib:.1f} {card}"
