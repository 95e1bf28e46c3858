"""The rollout engine: answers to many prompts from the policy's own weights.

A step draws a token for every active slot, lets finished answers go, runs the model on one token
per slot that is left, and gives the free slots to the next samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from prefloop.data.batches import Segment
from prefloop.errors import UserError
from prefloop.generation.cache import GPU_GROWTH, GROWTH, DecodePlan, SlotCache
from prefloop.generation.graphs import as_graphs
from prefloop.generation.packed import packed_linears
from prefloop.generation.sampler import Sampling, draw, request_uniforms
from prefloop.generation.scheduler import Request, Scheduler
from prefloop.models import adapters
from prefloop.models.attention.plan import PackedPlan
from prefloop.models.heads import logits
from prefloop.models.load import load_policy
from prefloop.models.model import LoadedModel

Prompts = Sequence[Sequence[int]]
CACHE_NAMES = ("past_key_values", "cache_params", "state")  # as Transformers' models call theirs


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
        prompts: Prompts,
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
    """RolloutEngine in this process, on the model's live weights; it keeps no copy.

    Whoever changes the weights in place counts `weights_version` up.
    """

    def __init__(
        self,
        model: LoadedModel,
        max_concurrent: int = 64,
        dtype: Literal["float32", "bfloat16"] = "float32",
        prefill_tokens: int = 4096,
    ) -> None:
        """Bounds: answers written at once, and prompt tokens computed at once (or one prompt)."""
        if max_concurrent < 1:
            raise UserError(f"max_concurrent = {max_concurrent}: give at least 1")
        self.model, self.max_concurrent, self.dtype = model, max_concurrent, dtype
        self.prefill_tokens, self.weights_version = prefill_tokens, 0

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        seed: int,
        on_done: Callable[[Sample], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Sample]]:
        """See RolloutEngine; `on_tokens` is shown each step's tokens [B], in the slots' order.

        A sample depends on (seed, prompt_index, sample_index) and its prompt, not on its company;
        `numbers` stand for the prompts' indices there (their places among all ranks' prompts).
        """
        self._check(prompts, n, sampling)
        done: dict[tuple[int, int], Sample] = {}
        new_answers = partial(
            Answers, sampling, seed, numbers or range(len(prompts)), self.model.device, on_tokens
        )
        loop = self._packed if self.model.packed else self._padless
        with self._inference():
            for sample in loop(prompts, n, new_answers):
                done[sample.prompt_index, sample.sample_index] = sample
                if on_done is not None:
                    on_done(sample)
        return [[done[index, number] for number in range(n)] for index in range(len(prompts))]

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

    def _check(self, prompts: Prompts, n: int, sampling: Sampling) -> None:
        if n < 1:
            raise UserError(f"n = {n} samples per prompt: give at least 1")
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {number} has no tokens: give at least one, such as BOS")
            self.model.check_length(len(prompt) + sampling.max_new_tokens)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Evaluation mode without gradients, the module's mode put back afterwards.

        One autocast around it all, so that each weight is cast once and not once a step; autocast
        keeps the casts only of parameters that require a gradient, so all do meanwhile.
        """
        module, training = self.model.module, self.model.module.training
        enabled, device = self.dtype == "bfloat16", self.model.device.type
        frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
        module.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            with (
                torch.no_grad(),
                torch.autocast(device, torch.bfloat16, enabled=enabled),
                packed_linears(module, torch.bfloat16 if enabled else self.model.hf.dtype),
            ):
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
            module.train(training)

    def _base(self, rows: Tensor, positions: Tensor, plan: PackedPlan | DecodePlan) -> Tensor:
        """Last hidden states [T, D] of a stream of tokens [T]."""
        output = self.model.base(
            input_ids=rows.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_plan=plan,
            use_cache=False,
        )
        return output.last_hidden_state[0]  # type: ignore[no-any-return]

    def _decode(self, cache: SlotCache, tokens: Tensor, positions: Tensor, length: int) -> Tensor:
        """See graphs.Step."""
        return self._base(tokens, positions, DecodePlan(cache, positions, length))

    def _packed(
        self, prompts: Prompts, n: int, new_answers: Callable[[int], Answers]
    ) -> Iterator[Sample]:
        """Continuous batching over packed prompts and slots."""
        device = self.model.device
        slots = min(self.max_concurrent, n * len(prompts))
        scheduler = Scheduler([len(p) for p in prompts], n, slots, self.prefill_tokens)
        answers = new_answers(slots)
        cache = SlotCache(
            slots,
            torch.bfloat16 if self.dtype == "bfloat16" else self.model.hf.dtype,
            GROWTH if device.type == "cpu" else GPU_GROWTH,
        )
        decode = as_graphs(partial(self._decode, cache), cache, device)
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
                rows, lengths[first:last], states = prefill.select(
                    [request.prompt_index for request in admitted]
                )
                cache.insert(first, rows, prefill.cache)
                answers.start(first, admitted)
                hidden.append(states)
            if not scheduler.active:
                return
            # 2. Every slot draws a token; the answers that end with it are handed out.
            tokens, ended = answers.step(logits(self.model, torch.cat(hidden)))
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
                places = lengths[:count].clone()
                hidden = [decode(tokens[:count], places, scheduler.longest)]
                lengths[:count] += 1

    def _prefill(self, indices: Sequence[int], prompts: Prompts) -> Prefill:
        """Computes these prompts as one packed stream."""
        device = self.model.device
        segments: list[Segment] = []
        for prompt in prompts:
            segments.append(Segment(segments[-1].rows.stop if segments else 0, len(prompt), -1, 0))
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(len(p)) for p in prompts]).to(device)
        plan = PackedPlan(segments, device, keep_cache=True, varlen=self.model.varlen)
        hidden = self._base(tokens, positions, plan)
        assert plan.cache is not None
        starts, lengths = torch.tensor([(s.start, s.length) for s in segments], device=device).T
        order = {prompt: number for number, prompt in enumerate(indices)}
        return Prefill(plan.cache, order, starts, lengths, hidden[starts + lengths - 1])

    def _padless(
        self, prompts: Prompts, n: int, new_answers: Callable[[int], Answers]
    ) -> Iterator[Sample]:
        """For models that packing does not suit: one prompt at a time, with Transformers' cache.

        A batch is copies of one prompt, so nothing needs padding; ended rows run on unread.
        """
        device, base = self.model.device, self.model.base
        for index, prompt in enumerate(prompts):
            for first in range(0, n, self.max_concurrent):
                active = [Request(index, s) for s in range(n)[first : first + self.max_concurrent]]
                answers = new_answers(len(active))
                answers.start(0, active)
                left = set(range(len(active)))
                inputs = torch.tensor([list(prompt)] * len(active), device=device)
                past: dict[str, Any] = {}
                while left:
                    output = base(input_ids=inputs, use_cache=True, **past)
                    past = {name: output[name] for name in CACHE_NAMES if name in output}
                    assert past, "the model keeps no cache that we know of"
                    hidden = output.last_hidden_state[:, -1]
                    tokens, ended = answers.step(logits(self.model, hidden))
                    inputs = tokens.unsqueeze(-1)
                    for slot in sorted(left.intersection(ended)):
                        yield answers.sample(slot, active[slot], self.weights_version)
                    left.difference_update(ended)


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


class Answers:
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
