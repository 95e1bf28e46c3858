"""The rollout engine: answers to many prompts from the policy's own weights.

A step draws a token for every active slot, lets finished answers go, runs the model on one token
per slot that is left, and gives the free slots to the next samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloop.data.batches import Segment
from prefloop.errors import UserError
from prefloop.generation.cache import GPU_GROWTH, GROWTH, DecodePlan, SlotCache
from prefloop.generation.graphs import as_graphs
from prefloop.generation.packed import Packed, pack_linears
from prefloop.generation.protocol import EngineConfig, Prompts, RolloutEngine, Sample
from prefloop.generation.sampler import Sampling
from prefloop.generation.scheduler import Request, Scheduler
from prefloop.generation.slots import Drawn, Prefill, Slots
from prefloop.models.attention.plan import PackedPlan
from prefloop.models.heads import logits
from prefloop.models.lean import Forward, forward_of
from prefloop.models.model import LoadedModel
from prefloop.models.sharding import gathered

CACHE_NAMES = ("past_key_values", "cache_params", "state")  # as Transformers' models call theirs


class Live(NamedTuple):
    """The model as one generation runs it."""

    base: nn.Module  # without its head
    forward: Forward  # of a packed stream
    logits: Callable[[Tensor], Tensor]  # of hidden states [N, D]


class Engine:
    """RolloutEngine in this process, on the model's live weights; it keeps no copy."""

    def __init__(
        self,
        model: LoadedModel,
        max_concurrent: int = 64,
        prefill_tokens: int = 4096,
    ) -> None:
        """Bounds: answers written at once, and prompt tokens computed at once (or one prompt)."""
        if max_concurrent < 1:
            raise UserError(f"max_concurrent = {max_concurrent}: give at least 1")
        self.model, self.max_concurrent = model, max_concurrent
        self.prefill_tokens, self.weights_version = prefill_tokens, 0

    def generate(
        self,
        prompts: Prompts,
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: Sequence[int] | None = None,
        on_done: Callable[[Sample], None] | None = None,
        on_tokens: Callable[[Tensor], None] | None = None,
    ) -> list[list[Sample]]:
        """See RolloutEngine; `on_tokens` is shown each step's tokens [B], in the slots' order."""
        self._check(prompts, n, sampling)
        samples: dict[tuple[int, int], Sample] = {}
        new_drawn = partial(
            Drawn, sampling, seed, numbers or range(len(prompts)), self.model.device, on_tokens
        )
        loop = self._packed if self.model.packed else self._padless
        with gathered(self.model, rounded=True) as model, self._inference(model) as live:
            for sample in loop(live, prompts, n, new_drawn):
                samples[sample.prompt_index, sample.sample_index] = sample
                if on_done is not None:
                    on_done(sample)
        return [[samples[index, number] for number in range(n)] for index in range(len(prompts))]

    def sync(self, model: LoadedModel, version: int) -> None:
        """See RolloutEngine; nothing is copied, so weights changed in place are seen anyway."""
        self.model, self.weights_version = model, version

    def _check(self, prompts: Prompts, n: int, sampling: Sampling) -> None:
        if n < 1:
            raise UserError(f"n = {n} samples per prompt: give at least 1")
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {number} has no tokens: give at least one, such as BOS")
            self.model.check_length(len(prompt) + sampling.max_new_tokens)

    @contextmanager
    def _inference(self, model: LoadedModel) -> Iterator[Live]:
        """The model in evaluation mode without gradients, its mode put back afterwards.

        One autocast around it all, so that each weight is cast once and not once a step; autocast
        keeps the casts only of parameters that require a gradient, so those that it casts do
        meanwhile.
        """
        module, training = model.module, model.module.training
        enabled = model.dtype == "bfloat16"
        module.eval()
        cast: list[nn.Parameter] = []
        try:
            with torch.no_grad(), model.computing():
                packed = pack_linears(model, torch.bfloat16 if enabled else model.hf.dtype)
                cast += _cast_by_autocast(module, packed) if enabled else []
                for parameter in cast:
                    parameter.requires_grad_(True)
                forward = forward_of(packed.base, model.lean, packed.linears)
                yield Live(packed.base, forward, partial(logits, model, head=packed.head))
        finally:
            for parameter in cast:
                parameter.requires_grad_(False)
            module.train(training)

    def _packed(
        self, live: Live, prompts: Prompts, n: int, new_drawn: Callable[[int], Drawn]
    ) -> Iterator[Sample]:
        """Continuous batching over packed prompts and slots."""
        device = self.model.device
        count = min(self.max_concurrent, n * len(prompts))
        cache = SlotCache(
            count,
            torch.bfloat16 if self.model.dtype == "bfloat16" else self.model.hf.dtype,
            GROWTH if device.type == "cpu" else GPU_GROWTH,
        )
        slots = Slots(
            prompts,
            Scheduler([len(p) for p in prompts], n, count, self.prefill_tokens),
            cache,
            new_drawn(count),
            as_graphs(partial(_decode, live.forward, cache), cache, device),
            lengths=torch.zeros(count, dtype=torch.long, device=device),
        )
        while slots.scheduler.unfinished:
            yield from self._step(live, slots)

    def _step(self, live: Live, slots: Slots) -> list[Sample]:
        """One token for every slot; the answers that end with it."""
        scheduler = slots.scheduler
        # 1. Free slots take the next samples; their prompts are computed when none is ready.
        while scheduler.free:
            if group := scheduler.next_prefill():
                slots.prefill = self._prefill(live, group, [slots.prompts[i] for i in group])
            if not (admitted := scheduler.admit()):
                break
            slots.admit(admitted)
        # 2. Every slot draws a token; the answers that end with it are handed out.
        tokens, ended = slots.drawn.step(live.logits(torch.cat(slots.hidden)))
        samples = [
            slots.drawn.sample(slot, scheduler.active[slot], self.weights_version) for slot in ended
        ]
        # 3. The last slots fill the holes, so that the active ones stand first.
        slots.free(ended, tokens)
        # 4. The model reads the new tokens.
        count, slots.hidden = len(scheduler.active), []
        if count:
            scheduler.steps += 1
            places = slots.lengths[:count].clone()
            slots.hidden = [slots.decode(tokens[:count], places, scheduler.longest)]
            slots.lengths[:count] += 1
        return samples

    def _prefill(self, live: Live, indices: Sequence[int], prompts: Prompts) -> Prefill:
        """Computes these prompts as one packed stream."""
        device = self.model.device
        segments: list[Segment] = []
        for prompt in prompts:
            segments.append(Segment(segments[-1].rows.stop if segments else 0, len(prompt), -1, 0))
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(len(p)) for p in prompts]).to(device)
        plan = PackedPlan(segments, device, keep_cache=True, varlen=self.model.varlen)
        hidden = live.forward(tokens, positions, plan)
        assert plan.cache is not None
        starts, lengths = torch.tensor([(s.start, s.length) for s in segments], device=device).T
        order = {prompt: number for number, prompt in enumerate(indices)}
        return Prefill(plan.cache, order, starts, lengths, hidden[starts + lengths - 1])

    def _padless(
        self, live: Live, prompts: Prompts, n: int, new_drawn: Callable[[int], Drawn]
    ) -> Iterator[Sample]:
        """For models that packing does not suit: one prompt at a time, with Transformers' cache.

        A batch is copies of one prompt, so nothing needs padding; ended rows run on unread.
        """
        device = self.model.device
        for index, prompt in enumerate(prompts):
            for first in range(0, n, self.max_concurrent):
                active = [Request(index, s) for s in range(n)[first : first + self.max_concurrent]]
                drawn = new_drawn(len(active))
                drawn.start(0, active)
                left = set(range(len(active)))
                inputs = torch.tensor([list(prompt)] * len(active), device=device)
                past: dict[str, Any] = {}
                while left:
                    output = live.base(input_ids=inputs, use_cache=True, **past)
                    past = {name: output[name] for name in CACHE_NAMES if name in output}
                    assert past, "the model keeps no cache that we know of"
                    hidden = output.last_hidden_state[:, -1]
                    tokens, ended = drawn.step(live.logits(hidden))
                    inputs = tokens.unsqueeze(-1)
                    for slot in sorted(left.intersection(ended)):
                        yield drawn.sample(slot, active[slot], self.weights_version)
                    left.difference_update(ended)


def _decode(
    forward: Forward, cache: SlotCache, tokens: Tensor, positions: Tensor, length: int
) -> Tensor:
    """See graphs.Step."""
    return forward(tokens, positions, DecodePlan(cache, positions, length))


def _cast_by_autocast(module: nn.Module, packed: Packed) -> list[nn.Parameter]:
    """Frozen float32 parameters of the layers that multiply by them, but for packed ones."""
    parameters: list[nn.Parameter] = []
    for part in module.modules():
        own = list(part.parameters(recurse=False))
        if part in packed.layers or isinstance(part, nn.Embedding) or all(p.ndim < 2 for p in own):
            continue
        parameters += [p for p in own if p.dtype == torch.float32 and not p.requires_grad]
    return parameters


def in_process(config: EngineConfig, model: LoadedModel) -> RolloutEngine:
    """The engine of commands that are given no other."""
    return Engine(model, config.max_concurrent)
