"""What the slots hold while answers are written: keys and values, lengths, and the tokens drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prefloop.errors import UserError
from prefloop.generation.cache import SlotCache
from prefloop.generation.graphs import Step
from prefloop.generation.protocol import Prompts, Sample
from prefloop.generation.sampler import Sampling, draw, request_uniforms
from prefloop.generation.scheduler import Request, Scheduler


@dataclass(frozen=True)
class Prefill:
    """Computed prompts, packed: keys and values [G, T, D] per layer, last hidden states [P, D]."""

    cache: dict[int, tuple[Tensor, Tensor]]
    order: dict[int, int]  # prompt index -> its place among the P
    starts: Tensor  # [P]
    lengths: Tensor  # [P]
    last: Tensor

    def select(self, prompts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of S prompts: rows [S, L] (the last repeated as padding), lengths [S], hidden [S, D]."""
        places = torch.tensor([self.order[p] for p in prompts], device=self.last.device)
        lengths = self.lengths[places]
        steps = torch.arange(int(lengths.max()), device=lengths.device)
        rows = self.starts[places, None] + torch.minimum(steps, lengths[:, None] - 1)
        return rows, lengths, self.last[places]


class Drawn:
    """What each slot has drawn so far, on the model's device."""

    def __init__(
        self,
        sampling: Sampling,
        seed: int,
        numbers: Sequence[int],
        device: torch.device,
        on_tokens: Callable[[Tensor], None] | None,
        slots: int,
    ) -> None:
        self.sampling, self.on_tokens = sampling, on_tokens
        self.seed, self.numbers = seed, numbers
        shape = (slots, sampling.max_new_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(shape, device=device)
        self.uniforms = torch.zeros(shape, device=device)
        self.counts = torch.zeros(slots, dtype=torch.long, device=device)
        self.stop = torch.tensor(sorted(sampling.stop_token_ids), dtype=torch.long, device=device)
        self.rows = (self.tokens, self.log_probs, self.uniforms, self.counts)

    def start(self, first: int, requests: Sequence[Request]) -> None:
        """Empties the slots from `first` on for these requests, with uniforms of their own."""
        last, count = first + len(requests), self.sampling.max_new_tokens
        drawn = [
            request_uniforms(self.seed, self.numbers[r.prompt_index], r.sample_index, count)
            for r in requests
        ]
        self.uniforms[first:last] = torch.stack(drawn).to(self.uniforms.device)
        self.counts[first:last] = 0

    def step(self, scores: Tensor) -> tuple[Tensor, list[int]]:
        """Draws from logits [B, V] for the first B slots: tokens [B], and the slots that ended."""
        slots = torch.arange(len(scores), device=scores.device)
        counts = self.counts[: len(scores)]
        tokens, log_probs = draw(scores, self.uniforms[slots, counts], self.sampling)
        self.tokens[slots, counts] = tokens
        self.log_probs[slots, counts] = log_probs
        counts += 1
        if self.on_tokens is not None:
            self.on_tokens(tokens)
        ended = torch.isin(tokens, self.stop) | (counts == self.sampling.max_new_tokens)
        return tokens, [slot for slot, end in enumerate(ended.tolist()) if end]

    def sample(self, slot: int, request: Request, weights_version: int) -> Sample:
        """The answer that ended in this slot."""
        count = int(self.counts[slot])
        tokens = self.tokens[slot, :count].tolist()
        log_probs = self.log_probs[slot, :count]
        if not bool(log_probs.isfinite().all()):
            raise UserError(
                f"prompt {request.prompt_index}: the model's logits are not finite, so nothing can "
                "be sampled; go back to an earlier checkpoint or lower --lr"
            )
        stopped = tokens[-1] in self.sampling.stop_token_ids
        return Sample(
            **vars(request),
            tokens=tuple(tokens),
            log_probs=tuple(log_probs.tolist()),
            finish_reason="stop" if stopped else "length",
            weights_version=weights_version,
        )


@dataclass
class Slots:
    """The state of one `generate`; the i-th active request has the i-th row of everything here."""

    prompts: Prompts
    scheduler: Scheduler
    cache: SlotCache
    drawn: Drawn
    decode: Step
    lengths: Tensor  # tokens held in the cache
    prefill: Prefill | None = None  # of the prompts computed last
    hidden: list[Tensor] = field(default_factory=list)  # of the tokens that stand last, in order

    def admit(self, requests: Sequence[Request]) -> None:
        """Gives the next free slots to samples of the prompts computed last."""
        assert self.prefill is not None
        last = len(self.scheduler.active)
        first = last - len(requests)
        rows, lengths, hidden = self.prefill.select([r.prompt_index for r in requests])
        self.lengths[first:last] = lengths
        self.cache.insert(first, rows, self.prefill.cache)
        self.drawn.start(first, requests)
        self.hidden.append(hidden)

    def free(self, ended: Sequence[int], tokens: Tensor) -> None:
        """Frees slots and moves the last ones to the holes, with their newest of `tokens` [B]."""
        sources, targets = self.scheduler.finish(ended)
        if sources:
            where = torch.tensor([sources, targets], device=tokens.device)
            self.cache.move(where[0], where[1], self.scheduler.longest)
            for row in (*self.drawn.rows, self.lengths, tokens):
                row[where[1]] = row[where[0]]
