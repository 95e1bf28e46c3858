"""A training step on tensors that have shapes alone, to see what it would hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prefloop.config import DPOConfig, PPOConfig, TrainingConfig
from prefloop.config.monitoring import MonitorConfig
from prefloop.data.batches import Segment, TokenBatch, pack, to_batches
from prefloop.data.tokenize import Example
from prefloop.generation.cache import GPU_GROWTH, GROWTH, DecodePlan, SlotCache
from prefloop.generation.packed import packed_bytes
from prefloop.generation.sampler import Sampling, draw
from prefloop.models.attention.plan import PackedPlan
from prefloop.models.heads import answer_log_probs, answer_scores, logits, token_values
from prefloop.models.lean import forward_of
from prefloop.models.model import LoadedModel
from prefloop.models.pieces import split_answers
from prefloop.models.shared import POLICY
from prefloop.training import optim
from prefloop.training.adamw import AdamW
from prefloop.training.bare_models import Role, WatchedModel, load_bare, own_weights, put_on
from prefloop.training.full_rows import answers_an_iteration
from prefloop.training.method import Method
from prefloop.training.tracing import (
    CACHE,
    GRADIENTS,
    OPTIMISER,
    TO_GENERATE,
    WEIGHTS,
    AsIfOn,
    Ledger,
    Part,
    Parts,
    backward,
)

LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
PREFILL_TOKENS = 4096  # of Engine
MONITOR, MONITOR_START = "monitor", "policy as it began"
BETWEEN = "between"
"""The stage of layers that are neither first nor last: a line's inner points are never its peak."""


@dataclass(frozen=True)
class Work:
    """What a training command does with its models."""

    command: str
    method: Callable[[Any, Mapping[str, LoadedModel]], Method[Any]]
    """The method of these settings and models (by role), without rows."""
    batch: Callable[[TokenBatch], Any] = lambda batch: batch
    """What the method's `loss` takes, of a packed micro-batch."""
    ranks: int = 1
    """How many share the weights, with gradients and moments."""


class Rehearsal:
    """One run of a command's stages on fake tensors."""

    def __init__(
        self,
        work: Work,
        config: TrainingConfig,
        roles: Sequence[Role],
        device: torch.device,
        rows: Sequence[Example],
        accumulates: bool,
        layers: Mapping[str, int],
    ) -> None:
        self.work, self.config = work, config
        self.rows, self.accumulates = rows, accumulates
        self.roles = {role.name: role for role in roles}
        self.layers = layers
        self.ledger = Ledger()
        self.mode = AsIfOn(device, self.ledger)
        self.device = self.mode.device
        self.models: dict[str, WatchedModel] = {}

    def run(self) -> dict[str, Parts]:
        """The parts at each stage's peak."""
        self.ledger.model = next(iter(self.roles))
        with torch.device("meta"):
            for name, role in self.roles.items():
                if role.on is None:
                    model = load_bare(role, self.config, self.layers[name], self.device)
                else:
                    lora: Any = self.models["policy"].module.peft_config
                    model = put_on(role, self.models[role.on], lora[POLICY])
                self.models[name] = model
        with self.ledger, torch.device("meta"), self.mode:
            # 1. The models, and what is done with one that then goes.
            for name, model in self.models.items():
                self._hold(name, model)
            if isinstance(self.config, DPOConfig) and "reference" in self.models:
                self.ledger.enter_stage("reference")
                self._score(partial(answer_log_probs, self.models["reference"]))
                self.ledger.enter_stage("")
                del self.models["reference"]
            # 2. The optimiser, as from the second step on.
            method = self.work.method(self.config, self.models)
            trained = {name: model.trainable() for name, model in method.trained.items()}
            optimizer = optim.build_optimizer(trained, self.config, method.learning_rates)
            self._fill_optimizer(optimizer, trained)
            average = self._average()
            # 3. A step; PPO samples and scores while its gradients still stand.
            self._step(method, trained)
            if isinstance(self.config, PPOConfig):
                slots = min(self.config.max_concurrent, answers_an_iteration(self.config))
                prompts = -(-slots // self.config.samples_per_prompt)
                longest = max(len(row.prompt) for row in self.rows)
                self._sample("sampling", self.config, slots, prompts, longest)
                self.ledger.enter_stage("scoring")
                for compute in self._scores(self.config):
                    self._score(compute)
            if isinstance(self.config, MonitorConfig) and self.config.monitor:
                self._monitor(self.config)
            del average
        return self.ledger.peaks

    def _hold(self, name: str, model: WatchedModel) -> None:
        """Counts the model's weights, and has it tell the ledger when it computes and how far a
        backward pass has come.
        """
        for tensor in own_weights(self.roles[name], model):
            self.ledger.claim(tensor, Part(name, WEIGHTS))
        ledger, places = self.ledger, [LAYER.search(f".{n}") for n, _ in _trained(model)]
        numbers = [int(place[1]) for place in places if place]
        top = max(numbers, default=0)

        def computes() -> None:
            ledger.model = name
            ledger.enter_section()

        def has_computed(_: nn.Module, inputs: Any, states: Tensor) -> None:
            if ledger.model != name:
                return
            ledger.enter_section()
            if states.requires_grad:
                states.register_hook(begins)

        def ends() -> None:
            self.mode.forget_casts()
            ledger.enter_section()

        def begins(_: Tensor) -> None:
            ledger.model = name
            ledger.enter_stage(f"backward, {name}")

        def arrived(parameter: Tensor, layer: int | None) -> None:
            assert parameter.grad is not None
            ledger.claim(parameter.grad, Part(name, GRADIENTS))
            if layer == 0:
                ledger.enter_stage(f"backward's end, {name}")
            elif layer is not None and layer < top:
                ledger.enter_stage(BETWEEN)

        model.begins, model.ends = computes, ends
        norms = [part for part in model.base.children() if "norm" in type(part).__name__.lower()]
        for norm in norms[-1:]:  # the last, which a Stack calls as Transformers does
            norm.register_forward_hook(has_computed)
        for (_, parameter), place in zip(_trained(model), places, strict=True):
            layer = int(place[1]) if place else None
            parameter.register_post_accumulate_grad_hook(lambda p, layer=layer: arrived(p, layer))

    def _fill_optimizer(
        self, optimizer: AdamW, trained: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Its states, as its first step makes them."""
        for parameters in trained.values():
            for parameter in parameters:
                optimizer.start(parameter)
        for name, model in self.models.items():
            for parameter in model.trainable():
                for state in optimizer.state[parameter].values():
                    if isinstance(state, Tensor):
                        self.ledger.claim(state, Part(name, OPTIMISER))

    def _average(self) -> list[Tensor]:
        """The weights of a reference that moves."""
        moves = isinstance(self.config, PPOConfig) and self.config.ema_reference
        trained = self.models["policy"].trainable() if moves else []
        average = [torch.empty_like(parameter, dtype=torch.float32) for parameter in trained]
        for tensor in average:
            self.ledger.claim(tensor, Part("moving reference", WEIGHTS))
        return average

    def _step(
        self,
        method: Method[Any],
        trained: Mapping[str, list[nn.Parameter]],
    ) -> None:
        """As `loop.step`, of whose micro-batches this is the last."""
        if self.accumulates:
            for name, model in self.models.items():
                for parameter in model.trainable():
                    parameter.grad = torch.empty_like(parameter)
                    self.ledger.claim(parameter.grad, Part(name, GRADIENTS))
        self.ledger.enter_stage("forward")
        batch = self.work.batch(pack(self.rows))
        out = method.loss(batch)
        total = torch.stack(list(out.terms.values())).sum()
        self.ledger.enter_stage("backward")
        backward(total)
        self.mode.forget_casts()
        self.ledger.enter_stage("update")
        for parameters in trained.values():
            optim.clip_gradients(parameters, self.config.max_grad_norm)

    def _score(self, compute: Callable[[TokenBatch], Tensor]) -> None:
        """Computes the rows' answers without gradients, some at a time if they are long."""
        most = self.config.micro_batch_tokens
        padded = not all(role.packed for role in self.roles.values())
        rows = split_answers(self.rows, most, padded)
        with torch.no_grad():
            for batch in to_batches(rows, most, self.device, padded):
                compute(batch)

    def _scores(self, config: PPOConfig) -> Iterator[Callable[[TokenBatch], Tensor]]:
        """What is computed of the sampled answers, in the order of `Sampler.roll_out`."""
        policy, heat = self.models["policy"], config.temperature
        yield lambda batch: answer_log_probs(policy, batch, heat)
        if reference := self.models.get("reference"):
            yield lambda batch: answer_log_probs(reference, batch, heat)
        if critic := self.models.get("critic"):
            yield lambda batch: token_values(critic, batch)
        for name, model in self.models.items():
            if name.startswith("reward model"):
                yield partial(answer_scores, model)

    def _monitor(self, config: MonitorConfig) -> None:
        """A measurement of a monitor's: as many answers as are sampled at once, to new prompts."""
        length, slots = self.config.max_length - config.max_new_tokens, config.max_concurrent
        self._sample("sampling for the monitor", config, slots, slots, length)
        self.ledger.enter_stage("scoring for the monitor")
        if judge := self.models.get(MONITOR):
            self._score(partial(answer_scores, judge))
        for name in ("policy", MONITOR_START):
            if name in self.models:
                self._score(partial(answer_log_probs, self.models[name]))

    def _sample(
        self, stage: str, config: MonitorConfig, slots: int, prompts: int, prompt: int
    ) -> None:
        """A prefill and the last decode step of `Engine`, every slot full; `prompt`: its tokens."""
        policy, ledger = self.models["policy"], self.ledger
        dtype = torch.bfloat16 if policy.dtype == "bfloat16" else torch.float32
        ledger.enter_stage(stage)
        copies = packed_bytes(policy.module, dtype) if self.device.type == "cpu" else 0
        packed = torch.empty(copies, dtype=torch.uint8)
        ledger.claim(packed, Part("policy", TO_GENERATE))
        weights = policy.module.parameters()
        frozen = [p for p in weights if p.is_floating_point() and not p.requires_grad]
        for parameter in frozen:  # as the engine does
            parameter.requires_grad_(not copies)
        computing = nullcontext() if copies else self.mode.one_cast(policy)
        with torch.no_grad(), computing:
            if policy.packed:
                self._decode(policy, slots, prompts, prompt, config, dtype)
            else:
                ids = torch.zeros(slots, prompt + config.max_new_tokens, dtype=torch.long)
                policy.base(input_ids=ids, use_cache=True)
        for parameter in frozen:
            parameter.requires_grad_(False)

    def _decode(
        self,
        policy: LoadedModel,
        slots: int,
        prompts: int,
        prompt: int,
        config: MonitorConfig,
        dtype: torch.dtype,
    ) -> None:
        def states(places: Tensor, plan: PackedPlan | DecodePlan) -> Tensor:
            return forward_of(policy.base, policy.lean)(torch.zeros_like(places), places, plan)

        # 1. As many prompts as are computed at once, and their keys and values in the slots.
        cache = SlotCache(slots, dtype, GROWTH if self.device.type == "cpu" else GPU_GROWTH)
        for length in range(prompt, prompt + config.max_new_tokens + 1):
            cache.reserve(length)
        count = min(max(1, PREFILL_TOKENS // prompt), prompts)
        segments = [Segment(i * prompt, prompt, -1, 0) for i in range(count)]
        plan = PackedPlan(segments, self.device, keep_cache=True, varlen=policy.varlen)
        states(torch.arange(prompt).repeat(count), plan)
        assert plan.cache is not None
        for layer, pair in plan.cache.items():
            cache.layers[layer] = tuple(  # type: ignore[assignment]
                x.new_zeros(slots, x.shape[0], cache.room, x.shape[2], dtype=dtype) for x in pair
            )
            for held in cache.layers[layer]:
                self.ledger.claim(held, Part("policy", CACHE))
        # 2. Every slot's next token, while the prompts' own are still held.
        places = torch.zeros(slots, dtype=torch.long)
        hidden = states(places, DecodePlan(cache, places, cache.room))
        sampling = Sampling(config.max_new_tokens, config.temperature)
        draw(logits(policy, hidden), torch.zeros(slots), sampling)


def _trained(model: LoadedModel) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_trainable().items())
