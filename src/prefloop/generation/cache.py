"""Keys and values of the answers being written: one slot each, the active slots always first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

GROWTH = 32  # the room's least growth; attention reads all of it, so there is little to spare
GPU_GROWTH = 256  # where each growth has the decode steps recorded anew


class SlotCache:
    """Per layer, keys and values [slots, G, room, D]; the room grows as answers do."""

    def __init__(self, slots: int, dtype: torch.dtype, growth: int = GROWTH) -> None:
        self.slots, self.dtype, self.room, self.growth = slots, dtype, 0, growth
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, length: int) -> None:
        """Makes room for `length` tokens in every slot, and a sixteenth more when it grows."""
        if self.room < length:
            self.room = -(-(length + length // 16) // self.growth) * self.growth
            for layer, pair in self.layers.items():
                self.layers[layer] = (_grown(pair[0], self.room), _grown(pair[1], self.room))

    def insert(self, first: int, rows: Tensor, prefill: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Copies rows [S, L] of a prefill's keys and values [G, T, D] to slots first..first+S."""
        last, length = first + rows.shape[0], rows.shape[1]
        for layer, pair in prefill.items():
            if layer not in self.layers:  # zeros: what is masked must still be finite
                self.layers[layer] = tuple(  # type: ignore[assignment]
                    x.new_zeros(self.slots, x.shape[0], self.room, x.shape[2], dtype=self.dtype)
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
        self.cache, self.positions = cache, positions
        self.rows = torch.arange(len(positions), device=positions.device)
        self.masks: dict[int | None, Tensor] = {}
        self.attention, self.mask_dtype = _in_one_kernel, cache.dtype
        if positions.device.type == "cpu":
            self.attention = _in_products
            self.mask_dtype = torch.promote_types(cache.dtype, torch.float32)
        cache.reserve(length)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """q [H, B, D], k and v [G, B, D] -> [B, H, D]; heads of a group become its queries."""
        keys, values = self.cache.layers[layer]
        keys[self.rows, :, self.positions] = k.transpose(0, 1).to(keys.dtype)
        values[self.rows, :, self.positions] = v.transpose(0, 1).to(values.dtype)
        heads, batch, width = q.shape
        asked = q.transpose(0, 1).reshape(batch, k.shape[0], -1, width).to(keys.dtype)
        output = self.attention(asked, keys[:batch], values[:batch], self.mask(window), scaling)
        return output.reshape(batch, heads, -1)

    def mask(self, window: int | None) -> Tensor:
        """[B, 1, 1, room]: 0 on a slot's own tokens (the last `window` of them), -inf beyond."""
        if window not in self.masks:
            places = torch.arange(self.cache.room, device=self.positions.device)
            distance = self.positions[:, None] - places
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            mask = torch.zeros(seen.shape, dtype=self.mask_dtype, device=seen.device)
            self.masks[window] = mask.masked_fill_(~seen, float("-inf"))[:, None, None]
        return self.masks[window]


def _in_one_kernel(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """q [B, G, R, D] over keys and values [B, G, L, D], mask [B, 1, 1, L] -> [B, G, R, D]."""
    return scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling)


def _in_products(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """The same in half the CPU's time: the keys come first in their product, read as they lie.

    Scores leave a product of bfloat16 as bfloat16; the mask and softmax are float32.
    """
    each = q.shape[:2]
    scores = torch.bmm(keys.flatten(0, 1), q.flatten(0, 1).transpose(1, 2))
    scores = scores.transpose(1, 2).unflatten(0, each)  # [B, G, R, L]
    masked = mask.new_empty(scores.shape)
    torch.add(mask, scores, alpha=scaling, out=masked)
    weights = masked.softmax(-1).to(q.dtype).flatten(0, 1)
    output: Tensor = torch.bmm(weights, values.flatten(0, 1)).unflatten(0, each)
    return output
