"""Attention over packed segments, registered with Transformers as `prefloop`.

A model called with `attention_plan=plan` hands every layer's queries, keys and values to the plan.
`PackedPlan` is the training and prefill form: each segment's queries see the keys of its ancestors
and, causally, its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from prefloop.data.batches import Segment, TokenBatch
from prefloop.models.attention.blocks import Blocks
from prefloop.models.attention.rectangles import Rectangles
from prefloop.models.attention.varlen import Varlen

NAME = "prefloop"
SMALL_SEGMENT = 2048  # mean queries x keys below which few large calls beat many small ones


class AttentionPlan(Protocol):
    """What a layer's attention is: q [H, T, D], k and v [G, T, D] -> [T, H, D]."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """The layer's attention over the stream."""
        ...


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_plan: AttentionPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention signature: query [1, H, T, D] -> output [1, T, H, D]."""
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("soft-capped attention and attention sinks take the padded path")
    assert dropout == 0.0 and attention_mask is None and query.shape[0] == 1
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    output = attention_plan.attend(layer, query[0], key[0], value[0], scaling, sliding_window)
    return output.unsqueeze(0), None


AttentionInterface.register(NAME, attention)


class PackedPlan:
    """The attention of one packed stream.

    `keep_cache`: keeps each layer's keys and values. `varlen`: the model may take Varlen, which
    serves bfloat16 only.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        device: torch.device,
        keep_cache: bool = False,
        varlen: bool = False,
    ) -> None:
        self.form: Varlen | Blocks | Rectangles
        scores = sum(s.length * (s.position + s.length) for s in segments)
        if varlen and torch.is_autocast_enabled(device.type):
            self.form = Varlen(segments, device)
        elif device.type == "cpu" and scores >= SMALL_SEGMENT * len(segments):
            self.form = Blocks(segments)
        else:
            self.form = Rectangles(segments, device)
        self.cache: dict[int, tuple[Tensor, Tensor]] | None = {} if keep_cache else None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """See AttentionPlan."""
        if self.cache is not None:
            self.cache[layer] = _alone(k), _alone(v)
        return self.form.attend(q, k, v, scaling, window)


def plan_of(batch: TokenBatch, varlen: bool) -> PackedPlan:
    """The batch's plan: made once for all the models and passes that read the batch."""
    device = batch.input_ids.device
    flash = varlen and torch.is_autocast_enabled(device.type)
    form = "varlen" if flash else "plain"
    if form not in batch.plans:
        batch.plans[form] = PackedPlan(batch.segments, device, varlen=flash)
    plan: PackedPlan = batch.plans[form]
    return plan


def _alone(x: Tensor) -> Tensor:
    """The same without the memory of what it was cut from, such as queries, keys and values."""
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x
