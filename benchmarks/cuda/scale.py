"""How large the work is: on a GPU, and the same on any processor in a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

GIB = 2**30
Line = dict[str, Any]
"""A line of the table: `what` and `result` in words, and the numbers."""


@dataclass(frozen=True)
class Scale:
    """Shapes of the models, and how much is done with them."""

    shapes: Mapping[str, Mapping[str, Any]]
    check: Mapping[str, Any]
    """Of the model whose numbers are compared with float64's."""
    lengths: tuple[tuple[int, tuple[int, ...]], ...]
    """There: tokens of prompts, and of their answers."""
    pairs: int
    """Rows of a training step."""
    prompt: tuple[int, int]
    answer: tuple[int, int]
    """Fewest and most tokens of them."""
    budget: Mapping[str, int]
    """Tokens of a micro-batch."""
    stock_budget: Mapping[str, int]
    """Of Transformers' own: its logits in float32 leave no room for more."""
    counts: tuple[int, ...]
    """Answers that are written at once."""
    new: int
    """Tokens of each, after `asked` tokens of a prompt."""
    asked: int
    rounds: int
    """Calls that are timed, after a first one."""
    product: int
    """Side of the square matrices whose product is the measure of MFU."""
    copied: int
    """Numbers of the copy that is the measure of bandwidth."""
    fits: Mapping[str, Mapping[str, Any]]
    """Settings of the runs whose memory is compared with its plan, by part."""
    cap: float = 24e9
    """Bytes that those may have: a card's of 24 GB, and its driver's share left free."""


Part = Callable[[Scale, torch.device], Iterator[Line]]

QLORA: dict[str, Any] = {
    "lora_rank": 16,
    "weights": "nf4",
    "gradient_checkpointing": True,
    "max_length": 1024,
    "micro_batch_tokens": 8192,
}
FULL = Scale(
    shapes={
        "135M": {
            "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
        "1B": {
            "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
        "8B": {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "tie_word_embeddings": False,
        },
    },
    check={
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
        "tie_word_embeddings": False, "initializer_range": 0.05,
    },
    lengths=((300, (200, 40, 3)), (5, (700,)), (150, (1, 60)), (40, (90, 90, 90, 90))),
    pairs=32, prompt=(128, 512), answer=(64, 512),
    budget={"135M": 16384, "1B": 16384, "8B": 8192},
    stock_budget={"135M": 16384, "1B": 4096},
    counts=(1, 8, 64, 256), new=128, asked=64, rounds=2,
    product=8192, copied=1 << 30,
    fits={
        "ppo-8b": QLORA | {
            "max_new_tokens": 256, "samples_per_prompt": 2, "batch_size": 16, "num_minibatches": 2,
            "ppo_epochs": 1, "max_concurrent": 64,
        },
        "dpo-8b": QLORA | {"batch_size": 8},
        "reward-8b": QLORA | {"batch_size": 8},
        "sft-1b-8bit": {
            "weights": "bfloat16", "optimizer": "adamw8bit", "max_length": 1024,
            "micro_batch_tokens": 8192, "batch_size": 16,
        },
    },
)  # fmt: skip
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "tie_word_embeddings": True,
}  # fmt: skip
SHORT = QLORA | {"lora_rank": 4, "max_length": 64, "micro_batch_tokens": 256}
TINY = Scale(
    shapes={"135M": SMALL, "1B": SMALL, "8B": SMALL | {"tie_word_embeddings": False}},
    check=SMALL | {"initializer_range": 0.05, "tie_word_embeddings": False},
    lengths=((9, (14,)), (24, (13, 1, 38)), (5, (2, 21)), (30, (9,))),
    pairs=4, prompt=(4, 12), answer=(3, 9),
    budget={"135M": 64, "1B": 64, "8B": 64},
    stock_budget={"135M": 64, "1B": 64},
    counts=(1, 4), new=16, asked=6, rounds=1,
    product=64, copied=1 << 16,
    fits={
        "ppo-8b": SHORT | {
            "max_new_tokens": 8, "samples_per_prompt": 2, "batch_size": 2, "num_minibatches": 2,
            "ppo_epochs": 1, "max_concurrent": 8,
        },
        "dpo-8b": SHORT | {"batch_size": 4},
        "reward-8b": SHORT | {"batch_size": 4},
        "sft-1b-8bit": {
            "weights": "bfloat16", "optimizer": "adamw8bit", "max_length": 64,
            "micro_batch_tokens": 256, "batch_size": 8,
        },
    },
)  # fmt: skip
