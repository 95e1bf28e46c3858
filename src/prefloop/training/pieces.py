"""A prompt whose answers are too many for one forward pass, computed as if in one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefloop.data.batches import TokenBatch, micro_batches, pack, split


def in_pieces(
    compute: Callable[[TokenBatch], Tensor], batch: TokenBatch, max_tokens: int
) -> Tensor:
    """What `compute` gives for the batch's answers or tokens, of at most `max_tokens` at a time.

    A loss that compares a prompt's answers needs all their numbers; it does not need all their
    activations. So each piece is computed without keeping any, and again when its gradient is due.
    """
    if batch.tokens <= max_tokens:
        return compute(batch)
    pieces = micro_batches(split(batch.examples, max_tokens), max_tokens)
    device = batch.input_ids.device
    numbers = []
    for piece in (pack(group).to(device) for group in pieces):
        if len(pieces) > 1 and torch.is_grad_enabled():
            numbers.append(checkpoint(compute, piece, use_reentrant=False))
        else:
            numbers.append(compute(piece))
    return torch.cat(numbers)
