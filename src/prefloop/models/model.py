"""A loaded model, as everything that computes with it sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefloop.data.encoder import Encoder
from prefloop.data.tokenize import Example, check_ids
from prefloop.errors import TooLong, UserError, located
from prefloop.models import adapters
from prefloop.models.lean import Lean
from prefloop.models.precision import Products, autocast
from prefloop.models.unread import Unread
from prefloop.models.weights import Storage

if TYPE_CHECKING:
    from prefloop.models.sharding import Sharded

SCORE_POSITION = "prefloop_score_position"
"""Key of a scorer's config: `rendered` or `stop`."""


@dataclass(eq=False)
class LoadedModel:
    """A model with its tokenizer, ready to take token batches."""

    module: nn.Module  # PreTrainedModel, or PeftModel around one
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    packed: bool  # False: fails the self-test, takes padded batches
    source: str
    dtype: Products = "float32"  # of the products
    max_length: int | None = None  # longest sequence with exact positions, where there is a bound
    lean: Lean | None = None  # what of its layers is computed here; None: nothing, or padded
    varlen: bool = False  # bfloat16 attention may be one call of FlashAttention
    dropout: Sequence[tuple[Any, str, float]] = ()  # the configuration's own rates, all off here
    template_args: Mapping[str, Any] | None = None  # of the chat template
    # Where several roles share the module (models/shared.py), each is told apart by:
    adapters: tuple[str, ...] | None = None  # those that add to it; None: as the module stands
    own_head: nn.Module | None = None  # a scorer's
    own_config: PretrainedConfig | None = None  # a scorer's
    source_dtype: torch.dtype = torch.float32  # in which its folder came and is exported
    unread: Unread = field(default_factory=dict)  # weights that are read when they are divided
    sharded: Sharded | None = None  # where its weights are divided among ranks

    @property
    def hf(self) -> PreTrainedModel:
        """The Transformers model, adapters in place."""
        return adapters.unwrap(self.module)

    @property
    def base(self) -> nn.Module:
        """The Transformers model without its head."""
        inner: nn.Module = self.hf.base_model
        return getattr(self.hf, "model", inner) if inner is self.hf else inner

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within it, products are computed in the model's dtype, by the role's own adapters."""
        with autocast(self.device, self.dtype), adapters.active(self.module, self.adapters):
            yield

    @property
    def config(self) -> PretrainedConfig:
        """The configuration that is exported with it."""
        return self.own_config or self.hf.config

    @property
    def score_head(self) -> nn.Module | None:
        """A scorer's linear layer from hidden states to a score; None for a policy."""
        return self.own_head or getattr(self.hf, "score", None)

    @property
    def is_scorer(self) -> bool:
        """True for a reward or value model (one label), False for a policy."""
        return self.score_head is not None

    @property
    def score_position(self) -> str:
        """Where a scorer reads: the last token of the whole rendered text, or the stop token.

        Rendered is what Transformers and most programs do. Scorers of prefloop's that are known by
        their mean and name no position were trained at the stop token.
        """
        config = self.config
        old = getattr(config, "reward_mean", None) is not None
        position = getattr(config, SCORE_POSITION, "stop" if old else "rendered")
        if position not in ("rendered", "stop"):
            raise UserError(
                f"{self.source}: {SCORE_POSITION} {position!r} in config.json is unknown here; it "
                "is rendered or stop"
            )
        return str(position)

    @cached_property
    def encoder(self) -> Encoder:
        """Texts and chats as the model's token ids; a scorer's as it is read."""
        if not self.is_scorer:
            return Encoder(self.tokenizer, self.template_args)
        pad = self.config.get_text_config().pad_token_id
        whole = self.score_position == "rendered"
        return Encoder(self.tokenizer, self.template_args, whole, pad if whole else None, False)

    def check_example(self, example: Example, room: int = 0) -> None:
        """UserError for an example (with `room` for an answer) that the model cannot read."""
        longest = max(map(len, example.answers), default=room)
        self.check_length(len(example.prompt) + longest, example.where)
        rows = len(self.hf.get_input_embeddings().weight)  # type: ignore[arg-type]
        check_ids(example, rows, self.tokenizer)

    def check_length(self, tokens: int, where: str = "") -> None:
        """TooLong for a sequence (from `where`) that the model's positions do not carry."""
        if self.max_length is not None and tokens > self.max_length:
            raise TooLong(
                f"{located(where)}{self.source}: a sequence of {tokens} tokens, but its positions "
                f"are exact up to {self.max_length} only; lower --max-length"
            )

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that take gradients."""
        return list(self.named_trainable().values())

    def named_trainable(self) -> dict[str, nn.Parameter]:
        """The same by name; of a shared module those of this role."""
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        if self.adapters is None:
            return named
        mine = {f".{name}." for name in self.adapters}
        named = {n: p for n, p in named.items() if any(name in f"{n}." for name in mine)}
        if self.own_head is not None:
            own = self.own_head.named_parameters()
            named |= {f"score.{name}": p for name, p in own if p.requires_grad}
        return named


class LoraOptions(TypedDict, total=False):
    """Which fresh adapters a model gets; none at rank 0 (see adapters.add_lora)."""

    lora_rank: int
    lora_alpha: float  # 0 means 2 x rank
    lora_targets: Sequence[str]
    lora_dropout: float
    modules_to_save: Sequence[str]


class ModelOptions(LoraOptions):
    """How a trained model differs from one that is only read."""

    storage: Storage
    trained: bool
    gradient_checkpointing: bool
    divided: bool  # among ranks, by sharding.shard, before anything computes with it
    template_args: Mapping[str, Any]
