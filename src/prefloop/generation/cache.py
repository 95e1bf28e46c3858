"""Keys and values of the answers being written: one slot each, the active slots always first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

GROWTH = 64  # lengths are multiples of this


class SlotCache:
    """Per layer, keys and values [slots, G, length, D]; the length grows as answers do."""

    def __init__(self, slots: int, dtype: torch.dtype) -> None:
        self.slots, self.dtype = slots, dtype
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens in every slot, with a quarter to spare when it grows."""
        for layer, pair in self.layers.items():
            if pair[0].shape[2] < length:
                room = -(-(length + length // 4) // GROWTH) * GROWTH
                self.layers[layer] = (_grown(pair[0], room), _grown(pair[1], room))

    def insert(self, first: int, rows: Tensor, prefill: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Copies rows [S, L] of a prefill's keys and values [G, T, D] to slots first..first+S."""
        last, length = first + rows.shape[0], rows.shape[1]
        for layer, pair in prefill.items():
            if layer not in self.layers:  # zeros: what is masked must still be finite
                self.layers[layer] = tuple(  # type: ignore[assignment]
                    x.new_zeros(self.slots, x.shape[0], 0, x.shape[2], dtype=self.dtype)
                    for x in pair
                )
        self.reserve(length)
        for layer, pair in prefill.items():
            for held, new in zip(self.layers[layer], pair, strict=True):
                held[first:last, :, :length] = new[:, rows].transpose(0, 1)

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies the first `length` tokens of slots `sources` over slots `targets`."""
        for pair in self.layers.values():
            for held in pair:
                held[targets, :, :length] = held[sources, :, :length]


def _grown(held: Tensor, room: int) -> Tensor:
    grown = held.new_zeros(*held.shape[:2], room, held.shape[3])
    grown[:, :, : held.shape[2]] = held
    return grown


class DecodePlan:
    """AttentionPlan of one new token for each of the first B slots."""

    def __init__(self, cache: SlotCache, positions: Tensor, length: int) -> None:
        """`positions` [B] is where each new token stands; `length` is one beyond the largest."""
        self.cache, self.positions, self.length = cache, positions, length
        self.rows = torch.arange(len(positions), device=positions.device)
        self.masks: dict[int | None, Tensor] = {}
        cache.reserve(length)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """q [H, B, D], k and v [G, B, D] -> [B, H, D]; heads of a group become its queries."""
        keys, values = self.cache.layers[layer]
        keys[self.rows, :, self.positions] = k.transpose(0, 1).to(keys.dtype)
        values[self.rows, :, self.positions] = v.transpose(0, 1).to(values.dtype)
        heads, batch, width = q.shape
        output = scaled_dot_product_attention(
            q.transpose(0, 1).reshape(batch, k.shape[0], -1, width).to(keys.dtype),
            keys[:batch, :, : self.length],
            values[:batch, :, : self.length],
            attn_mask=self.mask(window),
            scale=scaling,
        )
        return output.reshape(batch, heads, -1)

    def mask(self, window: int | None) -> Tensor:
        """[B, 1, 1, length]: 0 on a slot's own tokens (the last `window` of them), -inf beyond."""
        if window not in self.masks:
            places = torch.arange(self.length, device=self.positions.device)
            distance = self.positions[:, None] - places
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            mask = torch.zeros(seen.shape, dtype=self.cache.dtype, device=seen.device)
            self.masks[window] = mask.masked_fill_(~seen, float("-inf"))[:, None, None]
        return self.masks[window]
