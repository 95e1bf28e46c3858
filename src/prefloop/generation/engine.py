"""The rollout engine: answers to many prompts from the policy's own weights.

A step draws a token for every active slot, lets finished answers go, runs the model on one token
per slot that is left, and gives the free slots to the next samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from prefloop.config import UserError
from prefloop.data.batches import Segment
from prefloop.generation.cache import DecodePlan, SlotCache
from prefloop.generation.sampler import Sampling, draw, request_uniforms
from prefloop.generation.scheduler import Request, Scheduler
from prefloop.models import adapters
from prefloop.models.attention import PackedPlan
from prefloop.models.heads import logits
from prefloop.models.load import LoadedModel, load_policy

PREFILL_TOKENS = 4096  # prompt tokens computed at once


@dataclass(frozen=True)
class Sample:
    """One answer: its tokens with the stop token that ended it, and their log-probs in nats."""

    prompt_index: int
    sample_index: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]  # under the whole distribution at the sampling temperature
    finish_reason: Literal["stop", "length"]
    weights_version: int


class RolloutEngine(Protocol):
    """What PPO and the commands ask of an engine."""

    weights_version: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        on_done: Callable[[Sample], None] | None = None,
    ) -> list[list[Sample]]:
        """n samples of each prompt, in the prompts' order; `on_done` is told of each as it ends."""
        ...

    def load_weights(self, path: str) -> None:
        """Samples from the weights in this folder from now on, under a new version number."""
        ...


class Engine:
    """RolloutEngine in this process; it reads the model's live weights and keeps no copy.

    Whoever changes the weights in place counts `weights_version` up.
    """

    def __init__(
        self,
        model: LoadedModel,
        max_concurrent: int = 64,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        """At most `max_concurrent` answers are written at once; bfloat16 is autocast."""
        if max_concurrent < 1:
            raise UserError(f"max_concurrent = {max_concurrent}: give at least 1")
        self.model, self.max_concurrent, self.dtype = model, max_concurrent, dtype
        self.weights_version = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        on_done: Callable[[Sample], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
    ) -> list[list[Sample]]:
        """See RolloutEngine; `on_tokens` is shown each step's tokens [B], in the slots' order.

        A sample depends on (seed, prompt_index, sample_index) and its prompt, not on its company.
        """
        self._check(prompts, n, sampling)
        answers: list[list[Sample | None]] = [[None] * n for _ in prompts]
        loop = self._packed if self.model.packed else self._padless
        with self._inference():
            for sample in loop(prompts, n, sampling, seed, on_tokens or (lambda _: None)):
                answers[sample.prompt_index][sample.sample_index] = sample
                if on_done is not None:
                    on_done(sample)
        complete = [[sample for sample in row if sample is not None] for row in answers]
        assert all(len(row) == n for row in complete)
        return complete

    def load_weights(self, path: str) -> None:
        """Copies the weights of a folder into the model; an adapter's go into its adapters."""
        module = self.model.module
        if adapters.has_adapters(module):
            if not adapters.is_adapter_folder(path):
                raise UserError(f"{path}: no adapter_config.json; give a PEFT adapter's folder")
            set_peft_model_state_dict(module, load_peft_weights(path, "cpu"))
        else:
            self.model.hf.load_state_dict(load_policy(path, torch.device("cpu")).hf.state_dict())
        self.weights_version += 1

    @property
    def _cache_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else self.model.hf.dtype

    def _check(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> None:
        if n < 1:
            raise UserError(f"n = {n} samples per prompt: give at least 1")
        limit = getattr(self.model.hf.config, "max_position_embeddings", None)
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {number} has no tokens: give at least one, such as BOS")
            if limit and len(prompt) + sampling.max_new_tokens > limit:
                raise UserError(
                    f"prompt {number} has {len(prompt)} tokens; with max_new_tokens = "
                    f"{sampling.max_new_tokens} it exceeds the model's {limit} positions"
                )

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode without gradients, the module's mode put back afterwards.

        One autocast around it all, so that each weight is cast once and not once a step; autocast
        keeps the casts only of parameters that require a gradient, so all do meanwhile.
        """
        module, training = self.model.module, self.model.module.training
        bfloat16 = self.dtype == "bfloat16"
        frozen = [
            p
            for p in module.parameters()
            if bfloat16 and p.is_floating_point() and not p.requires_grad
        ]
        module.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            with (
                torch.no_grad(),
                torch.autocast(self.model.device.type, torch.bfloat16, enabled=bfloat16),
            ):
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            module.train(training)

    def _base(self, rows: Tensor, positions: Tensor, plan: PackedPlan | DecodePlan) -> Tensor:
        """Last hidden states [T, D] of a stream of tokens [T]."""
        output = self.model.hf.base_model(
            input_ids=rows.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_plan=plan,
            use_cache=False,
        )
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def _packed(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        on_tokens: Callable[[Tensor], None],
    ) -> Iterator[Sample]:
        """Continuous batching over packed prompts and slots."""
        device = self.model.device
        slots = min(self.max_concurrent, n * len(prompts))
        scheduler = Scheduler([len(p) for p in prompts], n, slots, PREFILL_TOKENS)
        answers = Answers(slots, sampling, device)
        cache = SlotCache(slots, self._cache_dtype)
        lengths = torch.zeros(slots, dtype=torch.long, device=device)  # tokens held in the cache
        hidden: list[Tensor] = []  # of the tokens that stand last in each slot
        prefill: Prefill | None = None
        while True:
            # 1. Free slots take the next samples; their prompts are computed when none is ready.
            while scheduler.free:
                if group := scheduler.next_prefill():
                    prefill = self._prefill(group, [prompts[i] for i in group])
                first = len(scheduler.active)
                if not (admitted := scheduler.admit()):
                    break
                assert prefill is not None
                last = first + len(admitted)
                rows, held, states = prefill.select([r.prompt_index for r in admitted])
                cache.insert(first, rows, prefill.cache)
                lengths[first:last] = held
                answers.start(first, admitted, seed)
                hidden.append(states)
            if not scheduler.active:
                return
            # 2. Every slot draws a token; the answers that end with it are handed out.
            tokens, ended = answers.step(logits(self.model, torch.cat(hidden)), on_tokens)
            for slot in ended:
                yield answers.sample(slot, scheduler.active[slot], self.weights_version)
            # 3. The last slots fill the holes, so that the active ones stand first.
            sources, targets = scheduler.finish(ended)
            if sources:
                where = torch.tensor([sources, targets], device=device)
                cache.move(where[0], where[1], scheduler.longest)
                for row in (*answers.rows, lengths, tokens):
                    row[where[1]] = row[where[0]]
            # 4. The model reads the new tokens.
            count, hidden = len(scheduler.active), []
            if count:
                scheduler.steps += 1
                plan = DecodePlan(cache, lengths[:count].clone(), scheduler.longest)
                hidden = [self._base(tokens[:count], plan.positions, plan)]
                lengths[:count] += 1

    def _prefill(self, indices: Sequence[int], prompts: Sequence[Sequence[int]]) -> Prefill:
        device = self.model.device
        segments: list[Segment] = []
        for prompt in prompts:
            segments.append(Segment(segments[-1].rows.stop if segments else 0, len(prompt), -1, 0))
        rows = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(len(p)) for p in prompts]).to(device)
        plan = PackedPlan(segments, device, keep_cache=True)
        hidden = self._base(rows, positions, plan)
        assert plan.cache is not None
        last = hidden[torch.tensor([s.rows[-1] for s in segments], device=device)]
        return Prefill(plan.cache, dict(zip(indices, segments, strict=True)), last)

    def _padless(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        on_tokens: Callable[[Tensor], None],
    ) -> Iterator[Sample]:
        """For models that packing does not suit: one prompt at a time, with Transformers' cache.

        A batch is copies of one prompt, so nothing needs padding; ended rows run on unread.
        """
        device, base = self.model.device, self.model.hf.base_model
        for index, prompt in enumerate(prompts):
            for first in range(0, n, self.max_concurrent):
                active = [
                    Request(index, s) for s in range(first, min(n, first + self.max_concurrent))
                ]
                answers = Answers(len(active), sampling, device)
                answers.start(0, active, seed)
                left = set(range(len(active)))
                inputs = torch.tensor([list(prompt)] * len(active), device=device)
                past: dict[str, Any] = {}
                while left:
                    output = base(input_ids=inputs, use_cache=True, **past)
                    past = {name: output[name] for name in CACHE_NAMES if name in output}
                    assert past, "the model keeps no cache that we know of"
                    hidden = output.last_hidden_state[:, -1]
                    tokens, ended = answers.step(logits(self.model, hidden), on_tokens)
                    inputs = tokens.unsqueeze(-1)
                    for slot in sorted(left.intersection(ended)):
                        yield answers.sample(slot, active[slot], self.weights_version)
                    left.difference_update(ended)


CACHE_NAMES = ("past_key_values", "cache_params", "state")  # as Transformers' models call theirs


@dataclass(frozen=True)
class Prefill:
    """Computed prompts, packed: keys and values [G, T, D] per layer, last hidden states [P, D]."""

    cache: dict[int, tuple[Tensor, Tensor]]
    segments: dict[int, Segment]  # by prompt index
    last: Tensor

    def select(self, prompts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Of S prompts: rows [S, L] (the last repeated as padding), lengths [S], hidden [S, D]."""
        device = self.last.device
        order = {prompt: number for number, prompt in enumerate(self.segments)}
        chosen = [self.segments[prompt] for prompt in prompts]
        starts, lengths, lines = torch.tensor(
            [(s.start, s.length, order[p]) for s, p in zip(chosen, prompts, strict=True)],
            device=device,
        ).T
        steps = torch.arange(max(s.length for s in chosen), device=device)
        rows = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
        return rows, lengths, self.last[lines]


class Answers:
    """What each slot has drawn so far, on the model's device."""

    def __init__(self, slots: int, sampling: Sampling, device: torch.device) -> None:
        shape = (slots, sampling.max_new_tokens)
        self.sampling = sampling
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(shape, device=device)
        self.uniforms = torch.zeros(shape, device=device)
        self.counts = torch.zeros(slots, dtype=torch.long, device=device)
        self.stop = torch.tensor(sorted(sampling.stop_token_ids), dtype=torch.long, device=device)
        self.rows = (self.tokens, self.log_probs, self.uniforms, self.counts)

    def start(self, first: int, requests: Sequence[Request], seed: int) -> None:
        """Empties the slots from `first` on for these requests, with uniforms of their own."""
        last = first + len(requests)
        self.counts[first:last] = 0
        self.uniforms[first:last] = torch.stack(
            [
                request_uniforms(seed, r.prompt_index, r.sample_index, self.sampling.max_new_tokens)
                for r in requests
            ]
        ).to(self.uniforms.device)

    def step(self, scores: Tensor, on_tokens: Callable[[Tensor], None]) -> tuple[Tensor, list[int]]:
        """Draws from logits [B, V] for the first B slots: tokens [B], and the slots that ended."""
        slots = torch.arange(len(scores), device=scores.device)
        counts = self.counts[: len(scores)]
        tokens, log_probs = draw(scores, self.uniforms[slots, counts], self.sampling)
        self.tokens[slots, counts] = tokens
        self.log_probs[slots, counts] = log_probs
        counts += 1
        on_tokens(tokens)
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
        reason: Literal["stop", "length"] = (
            "stop" if tokens[-1] in self.sampling.stop_token_ids else "length"
        )
        return Sample(
            request.prompt_index,
            request.sample_index,
            tuple(tokens),
            tuple(log_probs.tolist()),
            reason,
            weights_version,
        )
