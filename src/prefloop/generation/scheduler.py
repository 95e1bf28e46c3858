"""Who is computed when: prompts wait, are computed once, and their samples take slots as they free.

Plain Python; the tensors that follow its decisions live in engine.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One sample of one prompt."""

    prompt_index: int
    sample_index: int


class Scheduler:
    """Continuous batching over `slots` slots; active slots are 0..len(active) - 1."""

    def __init__(self, lengths: Sequence[int], n: int, slots: int, prefill_tokens: int) -> None:
        self.lengths, self.n, self.slots, self.prefill_tokens = lengths, n, slots, prefill_tokens
        self.waiting = deque(range(len(lengths)))  # prompts not computed yet
        self.ready: deque[Request] = deque()  # samples of the prompts computed last
        self.active: list[Request] = []  # what each slot is writing
        self.origins: list[int] = []  # of each slot: tokens held when it was filled, minus `steps`
        self.steps = 0  # of the model, so far

    @property
    def free(self) -> int:
        """Slots that hold nothing."""
        return self.slots - len(self.active)

    @property
    def unfinished(self) -> bool:
        """Some sample is not written yet."""
        return bool(self.waiting or self.ready or self.active)

    @property
    def longest(self) -> int:
        """Most tokens held by an active slot."""
        return max(self.origins) + self.steps

    def next_prefill(self) -> list[int]:
        """Prompts to compute now: as many as the token budget holds, once none is left ready."""
        group: list[int] = []
        tokens = 0
        if self.ready or not self.free:
            return group
        while self.waiting:
            tokens += self.lengths[self.waiting[0]]
            if group and tokens > self.prefill_tokens:
                break
            group.append(self.waiting.popleft())
        self.ready.extend(Request(prompt, sample) for prompt in group for sample in range(self.n))
        return group

    def admit(self) -> list[Request]:
        """Ready samples that now take the free slots, in the order of the slots."""
        admitted = [self.ready.popleft() for _ in range(min(self.free, len(self.ready)))]
        self.active.extend(admitted)
        self.origins.extend(self.lengths[r.prompt_index] - self.steps for r in admitted)
        return admitted

    def finish(self, slots: Sequence[int]) -> tuple[list[int], list[int]]:
        """Frees slots; the last active ones move from `sources` to `targets` to fill the holes."""
        finished, left = set(slots), len(self.active) - len(slots)
        targets = [slot for slot in slots if slot < left]
        sources = [slot for slot in range(left, len(self.active)) if slot not in finished]
        for source, target in zip(sources, targets, strict=True):
            self.active[target], self.origins[target] = self.active[source], self.origins[source]
        del self.active[left:], self.origins[left:]
        return sources, targets
