"""Decode steps as CUDA graphs: a step's thousand small kernels are launched by one call.

A graph works on the tensors it was recorded with. So there is one for each number of slots, rounded
up, and all are recorded anew when the cache's room grows. Rows beyond the active slots are those of
free slots, whose keys nobody reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prefloop.generation.cache import SlotCache

Step = Callable[[Tensor, Tensor, int], Tensor]
"""A decode step: tokens [B], positions [B], one beyond the largest -> last hidden states [B, D]."""

log = logging.getLogger("prefloop")
ROUND = 8  # slots are rounded up to a multiple, fewer to a power of two
TOLERANCE = 3e-2  # of the hidden states' norm: above bfloat16's rounding, below a wrong key


def as_graphs(step: Step, cache: SlotCache, device: torch.device) -> Step:
    """The step by graphs on CUDA, as it is elsewhere."""
    return Graphs(step, cache) if device.type == "cuda" else step


@dataclass(frozen=True)
class Recorded:
    """A step on `tokens` and `positions`; `replay` overwrites what `hidden` holds."""

    tokens: Tensor
    positions: Tensor
    hidden: Tensor
    replay: Callable[[], None]


class Graphs:
    """Steps by graphs; one by one where the model cannot be recorded, with one line that says so.

    What a step returns stands until the next one.
    """

    def __init__(self, plain: Step, cache: SlotCache) -> None:
        self.plain, self.cache = plain, cache
        self.room, self.works = 0, True
        self.recorded: dict[int, Recorded] = {}

    def __call__(self, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """See Step."""
        self.cache.reserve(length)
        if self.cache.room != self.room:
            self.room = self.cache.room
            self.recorded.clear()
        count = len(tokens)
        size = min(_rounded(count), self.cache.slots)
        if size not in self.recorded:
            expected = self.plain(tokens, positions, length)
            if self.works:
                self._record(size, tokens, positions, expected)
            return expected
        graph = self.recorded[size]
        graph.tokens[:count] = tokens
        graph.positions[:count] = positions
        graph.replay()
        return graph.hidden[:count]

    def _record(self, size: int, tokens: Tensor, positions: Tensor, expected: Tensor) -> None:
        """Keeps a graph of this step if it gives what the step gave; to do it again is harmless."""
        count = len(tokens)
        ids, places = tokens.new_zeros(size), positions.new_zeros(size)
        ids[:count], places[:count] = tokens, positions
        try:
            with torch.cuda.device_of(tokens):
                replay, hidden = record(lambda: self.plain(ids, places, self.room))
            replay()
            error = (hidden[:count] - expected).norm() / expected.norm()
            self.works = bool(error <= TOLERANCE)
        except RuntimeError as error:  # what it does cannot be recorded, such as reading a number
            log.debug("CUDA graph: %r", error)
            self.works = False
        if self.works:
            self.recorded[size] = Recorded(ids, places, hidden, replay)
        else:
            self.recorded.clear()
            self.plain(tokens, positions, self.room)  # over keys that a replay may have spoilt
            log.warning("decode steps are not taken as CUDA graphs: the model does not suit them")


def _rounded(count: int) -> int:
    """The next power of two, or the next multiple of ROUND."""
    return 1 << (count - 1).bit_length() if count < ROUND else -(-count // ROUND) * ROUND


def record(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A step as a graph that has not run yet, and the tensor in which it leaves its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output
