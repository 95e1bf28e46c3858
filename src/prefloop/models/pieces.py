"""A prompt whose answers are too many for one forward pass, computed as if in one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefloop.data.batches import TokenBatch, computed_tokens, micro_batches, pack, split_answers
from prefloop.models.model import LoadedModel


def in_pieces(
    compute: Callable[[LoadedModel, TokenBatch], Tensor],
    model: LoadedModel,
    batch: TokenBatch,
    max_tokens: int,
) -> Tensor:
    """What `compute` gives for the batch's answers or tokens, of at most `max_tokens` at a time.

    A loss that compares a prompt's answers needs all their numbers; it does not need all their
    activations. So each piece is computed without keeping any, and again when its gradient is due.
    """
    padded = not model.packed
    if computed_tokens(batch.examples, padded) <= max_tokens:
        return compute(model, batch)
    pieces = micro_batches(split_answers(batch.examples, max_tokens, padded), max_tokens, padded)
    device = batch.input_ids.device
    numbers = []
    for piece in (pack(group).to(device) for group in pieces):
        if len(pieces) > 1 and torch.is_grad_enabled():
            numbers.append(checkpoint(compute, model, piece, use_reentrant=False))
        else:
            numbers.append(compute(model, piece))
    return torch.cat(numbers)
