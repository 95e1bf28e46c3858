"""Attention over packed segments on CUDA in bfloat16: one call of FlashAttention-2 (2307.08691).

Each segment is a sequence of its own length whose keys are those of its whole path, so that no
query is padded and no score hidden by causality is computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from prefloop.data.batches import Segment, rows_of_path
from prefloop.models.precision import product_dtype

CAPABILITY = (8, 0)  # compute capability from which the kernel runs: Ampere
ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 does not


def serves(device: torch.device) -> bool:
    """Whether the kernel runs on this device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


class Varlen:
    """The attention of one packed stream."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        paths = [rows_of_path(segments, index) for index in range(len(segments))]
        queries, keys = [s.length for s in segments], [len(path) for path in paths]
        self.longest = max(queries), max(keys)
        self.query_ends, self.key_ends = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (queries, keys)
        )
        self.key_rows: Tensor | None = None  # where all segments are roots, keys lie as queries do
        if queries != keys:
            rows = [row for path in paths for row in path]
            self.key_rows = torch.tensor(rows, device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
        """q [H, T, D], k and v [G, T, D] -> [T, H, D], in autocast's type.

        The last query of a segment sees the last key: so the kernel aligns its causal mask.
        """
        q, k, v = (x.transpose(0, 1).to(product_dtype(x)) for x in (q, k, v))
        if self.key_rows is not None:
            k, v = k.index_select(0, self.key_rows), v.index_select(0, self.key_rows)
        grouped: dict[str, Any] = {}
        if ASKS_FOR_GROUPS:
            grouped["enable_gqa"] = q.shape[1] != k.shape[1]
        output: Tensor = varlen_attn(  # type: ignore[assignment]
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            self.query_ends,
            self.key_ends,
            self.longest[0],
            self.longest[1],
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),  # keys before the query's own
            **grouped,
        )
        return output
