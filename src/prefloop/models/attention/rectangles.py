"""Attention over packed segments in few calls.

Segments of like size are gathered into one rectangle, whatever their number: for CUDA, and for
segments so tiny that a call each would cost the CPU more. There a rectangle's scores are a handful
of numbers a segment, for which torch's kernel of scaled_dot_product_attention has too much to do
around them: plain batched products take half of its time backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from prefloop.data.batches import Segment, rows_of_path
from prefloop.models.precision import product_dtype

PADDING_WASTE = 1.25  # a rectangle may hold this many times the scores its segments need
SMALL_RECTANGLE = 1 << 16  # scores below which joining always beats one more call


class Rectangles:
    """The attention of one packed stream.

    `kernel`: by scaled_dot_product_attention and not by plain products; None: off the CPU.
    """

    def __init__(
        self, segments: Sequence[Segment], device: torch.device, kernel: bool | None = None
    ) -> None:
        self.kernel = device.type != "cpu" if kernel is None else kernel
        shapes = [(s.length, len(rows_of_path(segments, i))) for i, s in enumerate(segments)]
        groups = _group(shapes)
        self.groups = [_rectangle(segments, group, device) for group in groups]
        order = torch.empty(sum(s.length for s in segments), dtype=torch.long)
        offset = 0
        for group, rectangle in zip(groups, self.groups, strict=True):
            width = rectangle.query_rows.shape[1]
            for line, index in enumerate(group):
                start, length = segments[index].start, segments[index].length
                first = offset + line * width
                order[start : start + length] = torch.arange(first, first + length)
            offset += rectangle.query_rows.numel()
        self.order = order.to(device)  # where each row of the stream stands in the rectangles

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
        """q [H, T, D], k [G, T, D], v [G, T, E] -> [T, H, E], in autocast's type or their own."""
        q, k, v = (x.transpose(0, 1).to(product_dtype(x)) for x in (q, k, v))
        outputs = [r.attend(q, k, v, scaling, window, self.kernel) for r in self.groups]
        return torch.cat(outputs).index_select(0, self.order)


@dataclass
class Rectangle:
    """S segments as one padded attention: queries [S, Q] and the keys [S, K] they may see."""

    query_rows: Tensor  # [S, Q] rows of the stream; padding repeats the first
    key_rows: Tensor  # [S, K]
    query_positions: Tensor  # [S, Q]
    key_positions: Tensor  # [S, K]; padding stands beyond every query
    causal: bool  # all segments are roots of one length: no mask is needed
    masks: dict[tuple[int | None, int, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """[S, 1, groups * Q, K]: 0 where a query sees a key, -inf elsewhere."""
        key = (window, groups, dtype)
        if key not in self.masks:
            distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
            seen = distance >= 0
            if window is not None:
                seen &= distance < window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            mask.masked_fill_(~seen, float("-inf"))
            self.masks[key] = mask.repeat(1, groups, 1).unsqueeze(1)
        return self.masks[key]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, kernel: bool
    ) -> Tensor:
        """q [T, H, D], k and v [T, G, D] -> [S * Q, H, D]."""
        heads, groups = q.shape[1], q.shape[1] // k.shape[1]
        q, k, v = (
            _gather(q, self.query_rows),
            _gather(k, self.key_rows),
            _gather(v, self.key_rows),
        )
        segments, _, queries, width = q.shape
        kept = v.shape[-1]  # multi-head latent attention has narrower values than keys
        if not kernel:
            folded = q.reshape(segments, heads // groups, groups * queries, width)
            mask = self.mask(window, groups, torch.promote_types(q.dtype, torch.float32))
            args = (folded, k, v, mask, scaling)
            small: Tensor = _SmallAttention.apply(*args)  # type: ignore[no-untyped-call]
            output = small.view(segments, heads, queries, kept)
        elif self.causal and (window is None or window >= queries):
            output = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1
            )
        else:  # the query heads that share a key head are folded into more queries
            folded = q.reshape(segments, heads // groups, groups * queries, width)
            mask = self.mask(window, groups, q.dtype)
            output = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scaling)
            output = output.reshape(segments, heads, queries, kept)
        return output.transpose(1, 2).reshape(segments * queries, heads, kept)


class _SmallAttention(torch.autograd.Function):
    """softmax(q k' scaling + mask) v of q [S, G, R * Q, D], k [S, G, K, D] and v [S, G, K, E].

    Scores, weights and their gradients are at least float32. The backward pass computes the
    weights again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scaling = scaling
        asked, seen, kept = (_precise(x) for x in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            return (_weights(asked, seen, mask, scaling) @ kept).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask = ctx.saved_tensors
        asked, seen, kept, given = (_precise(x) for x in (q, k, v, grads[0]))
        with torch.autocast("cpu", enabled=False):
            weights = _weights(asked, seen, mask, ctx.scaling)
            by_v = weights.transpose(2, 3) @ given
            by_weights = given @ kept.transpose(2, 3)
            by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
            by_scores.mul_(ctx.scaling)
            by_q, by_k = by_scores @ seen, by_scores.transpose(2, 3) @ asked
        return by_q.to(q.dtype), by_k.to(k.dtype), by_v.to(v.dtype), None, None


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _weights(asked: Tensor, seen: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """[S, G, R * Q, K]."""
    return (asked @ seen.transpose(2, 3)).mul_(scaling).add_(mask).softmax(-1)


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """x [T, H, D], rows [S, L] -> [S, H, L, D]."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, *x.shape[1:]).transpose(1, 2)


def _group(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Groups segments of (queries, keys) into rectangles that waste little."""
    groups: list[list[int]] = []
    needed = widest_q = widest_k = 0
    for index in sorted(
        range(len(shapes)), key=lambda i: (shapes[i][0] == shapes[i][1], shapes[i])
    ):
        q, k = shapes[index]
        if groups:
            size = len(groups[-1]) + 1
            padded = size * max(q, widest_q) * max(k, widest_k)
            same_kind = (q == k) == (shapes[groups[-1][0]][0] == shapes[groups[-1][0]][1])
            if same_kind and padded <= max(PADDING_WASTE * (needed + q * k), SMALL_RECTANGLE):
                groups[-1].append(index)
                needed, widest_q, widest_k = needed + q * k, max(q, widest_q), max(k, widest_k)
                continue
        groups.append([index])
        needed, widest_q, widest_k = q * k, q, k
    return groups


def _rectangle(segments: Sequence[Segment], group: list[int], device: torch.device) -> Rectangle:
    keys = [rows_of_path(segments, index) for index in group]
    widest_q = max(segments[index].length for index in group)
    widest_k = max(len(rows) for rows in keys)
    beyond = max(segments[i].position + segments[i].length for i in group) + 1
    query_rows, query_positions, key_rows, key_positions = [], [], [], []
    for index, rows in zip(group, keys, strict=True):
        segment = segments[index]
        pad_q, pad_k = widest_q - segment.length, widest_k - len(rows)
        query_rows.append([*segment.rows] + [segment.start] * pad_q)
        end = segment.position + segment.length
        query_positions.append([*range(segment.position, end)] + [segment.position] * pad_q)
        key_rows.append(rows + rows[:1] * pad_k)
        key_positions.append([*range(len(rows))] + [beyond] * pad_k)
    lengths = {(segments[index].length, len(rows)) for index, rows in zip(group, keys, strict=True)}
    tensors: list[Tensor] = [
        torch.tensor(x, device=device)
        for x in (query_rows, key_rows, query_positions, key_positions)
    ]
    causal = len(lengths) == 1 and widest_q == widest_k
    return Rectangle(tensors[0], tensors[1], tensors[2], tensors[3], causal=causal)
