"""Attention over packed segments on the CPU: block by block, in batched matrix products.

Blocks are small enough for the cache and need no padding, and what two answers share is read where
it stands. Scores, weights and their gradients are float32 also where q, k and v are bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from prefloop.data.batches import Segment
from prefloop.models.precision import product_dtype

QUERIES = 256  # rows of a block; more would compute more of what causality hides


class Block(NamedTuple):
    """Consecutive queries of one segment and the runs of rows whose keys they may see."""

    queries: slice
    keys: tuple[slice, ...]  # ancestors, outermost first; then the segment's own up to the block


class Blocks:
    """The attention of one packed stream."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.blocks = []  # they cover every row once
        for segment in segments:
            runs: tuple[slice, ...] = ()
            above = segment.parent
            while above >= 0:
                runs = (slice(segments[above].start, segments[above].rows.stop), *runs)
                above = segments[above].parent
            for start in range(segment.start, segment.rows.stop, QUERIES):
                stop = min(start + QUERIES, segment.rows.stop)
                keys = (*runs, slice(segment.start, stop))
                self.blocks.append(Block(slice(start, stop), keys))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
        """q [H, T, D], k [G, T, D], v [G, T, E] -> [T, H, E], in autocast's type or their own."""
        q, k, v = (x.to(product_dtype(x)) for x in (q, k, v))
        args = (q, k, v, self.blocks, scaling, window)
        output: Tensor = _BlockAttention.apply(*args)  # type: ignore[no-untyped-call]
        return output


class _BlockAttention(torch.autograd.Function):
    """softmax(q k' scaling) v; the backward pass computes the probabilities again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Sequence[Block],
        scaling: float,
        window: int | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.how = blocks, scaling, window
        heads, groups = q.shape[0], k.shape[0]
        output = q.new_empty(q.shape[1], groups, heads // groups, v.shape[2])
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks:
                asked, seen = _folded(q, block, groups), _joined(k, block)
                weights = _probabilities(asked, seen, block, scaling, window)
                mixed = torch.bmm(weights, _joined(v, block).to(weights.dtype))
                _as_rows(output[block.queries], mixed)
        return output.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors  # type: ignore[attr-defined]
        blocks, scaling, window = ctx.how  # type: ignore[attr-defined]
        groups = k.shape[0]
        grad = grads[0].transpose(0, 1)  # [H, T, E]
        by_q = q.new_empty(q.shape[1], groups, q.shape[0] // groups, q.shape[2])
        by_k = torch.zeros(k.shape, dtype=_precise(k.dtype), device=k.device)
        by_v = torch.zeros(v.shape, dtype=_precise(v.dtype), device=v.device)
        with torch.autocast(q.device.type, enabled=False):
            for block in blocks:
                asked, seen = _folded(q, block, groups), _joined(k, block)
                given = _folded(grad, block, groups)
                weights = _probabilities(asked, seen, block, scaling, window)
                by_weights = torch.bmm(
                    given.to(weights.dtype), _joined(v, block).to(weights.dtype).transpose(1, 2)
                )
                by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
                by_scores = by_scores.mul_(scaling).to(q.dtype)
                _as_rows(by_q[block.queries], torch.bmm(by_scores, seen))
                _spread(by_k, block, torch.bmm(by_scores.transpose(1, 2), asked))
                _spread(by_v, block, torch.bmm(weights.to(v.dtype).transpose(1, 2), given))
        by_q = by_q.flatten(1, 2).transpose(0, 1)
        return by_q, by_k.to(k.dtype), by_v.to(v.dtype), None, None, None


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _probabilities(
    asked: Tensor, seen: Tensor, block: Block, scaling: float, window: int | None
) -> Tensor:
    """Of queries [G, R * L, D] over keys [G, K, D], in float32: [G, R * L, K]."""
    dtype = _precise(asked.dtype)
    scores = torch.bmm(asked.to(dtype) * scaling, seen.to(dtype).transpose(1, 2))
    queries = block.queries.stop - block.queries.start
    keys = scores.shape[2]
    each = scores.view(scores.shape[0], -1, queries, keys)
    each[..., keys - queries :] += scores.new_full((queries, queries), float("-inf")).triu_(1)
    if window is not None and window < keys:
        each += scores.new_full((queries, keys), float("-inf")).tril_(keys - queries - window)
    return scores.softmax(-1)


def _folded(x: Tensor, block: Block, groups: int) -> Tensor:
    """x [H, T, D] -> the block's [G, R * L, D]: the heads of a group become more queries."""
    return x[:, block.queries].reshape(groups, -1, x.shape[2])


def _joined(x: Tensor, block: Block) -> Tensor:
    """x [G, T, D] -> the rows that the block sees [G, K, D]."""
    runs = [x[:, rows] for rows in block.keys]
    return torch.cat(runs, 1) if len(runs) > 1 else runs[0]


def _as_rows(target: Tensor, source: Tensor) -> None:
    """Writes [G, R * L, E] into rows [L, G, R, E]."""
    length, groups, share, width = target.shape
    target.permute(1, 2, 0, 3).copy_(source.view(groups, share, length, width))


def _spread(total: Tensor, block: Block, part: Tensor) -> None:
    """Adds gradients [G, K, D] of the keys seen to those of all rows."""
    runs = part.split([rows.stop - rows.start for rows in block.keys], 1)
    for rows, run in zip(block.keys, runs, strict=True):
        total[:, rows] += run
