"""A loaded model, as everything that computes with it sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefloop.errors import UserError, located
from prefloop.models import adapters


@dataclass(eq=False)
class LoadedModel:
    """A model with its tokenizer, ready to take token batches."""

    module: nn.Module  # PreTrainedModel, or PeftModel around one
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    packed: bool  # False: fails the self-test, takes padded batches
    source: str
    max_length: int | None = None  # longest sequence with exact positions, where there is a bound
    varlen: bool = False  # bfloat16 attention may be one call of FlashAttention

    @property
    def hf(self) -> PreTrainedModel:
        """The Transformers model, adapters in place."""
        return adapters.unwrap(self.module)

    @property
    def base(self) -> nn.Module:
        """The Transformers model without its head."""
        found: nn.Module = self.hf.base_model
        return getattr(self.hf, "model", found) if found is self.hf else found

    @property
    def is_scorer(self) -> bool:
        """True for a reward or value model (one label), False for a policy."""
        return hasattr(self.hf, "score")

    def check_length(self, tokens: int, where: str = "") -> None:
        """UserError for a sequence (from `where`) that the model's positions do not carry."""
        if self.max_length is not None and tokens > self.max_length:
            raise UserError(
                f"{located(where)}{self.source}: a sequence of {tokens} tokens, but its positions "
                f"are exact up to {self.max_length} only; lower --max-length"
            )

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that take gradients."""
        return [p for p in self.module.parameters() if p.requires_grad]


class ModelOptions(TypedDict):
    """How a trained model differs from one that is only read."""

    lora_rank: int
    lora_alpha: float
    gradient_checkpointing: bool
