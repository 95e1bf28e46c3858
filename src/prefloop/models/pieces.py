"""Prompts whose answers are too many for one forward pass: split, and computed as if in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prefloop.data.batches import TokenBatch, micro_batches, pack, packed_length
from prefloop.data.tokenize import Example
from prefloop.models.memory import RECOMPUTED
from prefloop.models.model import LoadedModel


def computed_tokens(examples: Sequence[Example], padded: bool = False) -> int:
    """Tokens of one forward pass over the examples: of their stream, or `padded` to a rectangle."""
    if not padded:
        return sum(map(packed_length, examples))
    rows = [len(example.prompt) + len(answer) for example in examples for answer in example.answers]
    return len(rows) * max(rows, default=0)


def split_answers(
    examples: Sequence[Example], max_tokens: int, padded: bool = False
) -> list[Example]:
    """The examples in order, those longer than `max_tokens` as pieces: some of their answers each.

    The prompt is repeated; an answer that is too long with its prompt stands alone. A piece says
    nothing of how answers compare: its tiers and labels stay with the whole example.
    """
    pieces = []
    for example in examples:
        first = 0
        for end in range(1, len(example.answers)):
            if computed_tokens([_some_answers(example, first, end + 1)], padded) > max_tokens:
                pieces.append(_some_answers(example, first, end))
                first = end
        pieces.append(_some_answers(example, first, len(example.answers)) if first else example)
    return pieces


def _some_answers(example: Example, first: int, end: int) -> Example:
    chosen = slice(first, end)
    answers, masks = example.answers[chosen], example.answer_masks[chosen]
    return replace(example, answers=answers, answer_masks=masks, tiers=(), labels=())


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
        if len(pieces) == 1 or not torch.is_grad_enabled():
            numbers.append(compute(model, piece))
        elif model.sharded is not None:
            numbers.append(model.sharded.recomputed(compute, model, piece))
        else:
            numbers.append(checkpoint(compute, model, piece, **RECOMPUTED))
    return torch.cat(numbers)
