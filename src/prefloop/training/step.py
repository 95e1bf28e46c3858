"""One optimiser step over all ranks: counts, forward, backward, clip; and the same sums of held-out
rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefloop import distributed
from prefloop.config import TrainingConfig
from prefloop.models.adapters import adapter_dropout
from prefloop.models.sharding import in_step
from prefloop.training import optim
from prefloop.training.keeper import NotFinite
from prefloop.training.method import Batch, LossSums, Method

NOTHING = LossSums({}, {})


class Outcome(NamedTuple):
    """What a step gave, over all ranks; all empty where no rank had a batch."""

    losses: dict[str, float]  # `loss`, and its terms where there are several
    metrics: dict[str, float]
    norms: dict[str, float]  # of the gradients of each trained model, before clipping

    @property
    def finite(self) -> bool:
        """Whether all losses and norms are numbers."""
        return all(map(math.isfinite, (*self.losses.values(), *self.norms.values())))


def first_of(ranks: range, has: Callable[[range], bool]) -> int | None:
    """The first of the ranks that `has` something, known to be among them, by halves: with N ranks
    log2(N) + 1 questions. None where no rank has it alone.

    >>> first_of(range(8), lambda some: 5 in some or 6 in some)
    5
    """
    while len(ranks) > 1:
        half = ranks[: len(ranks) // 2]
        ranks = half if has(half) else ranks[len(half) :]
    return ranks[0] if has(ranks) else None


def optimizer_step(
    method: Method[Any],
    batches: Sequence[Any],
    parameters: Mapping[str, list[nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    before_update: Callable[[], None] = lambda: None,
    number: int = 0,
) -> Outcome:
    """One optimiser step on this rank's batches; the method hears of its metrics.

    `before_update` is called when weights are about to change. Where the loss or a gradient is not
    finite, NotFinite is raised and they do not. Where no rank has a batch nothing is done. The
    step's `number`, with seed and rank, says what adapters drop.
    """
    models, world = list(method.trained.values()), distributed.world()
    seed = (config.seed * 1_000_003 + number) * world + distributed.rank()

    def of(ranks: range) -> Outcome:
        """What these ranks' batches give; all of the ranks come to it."""
        optimizer.zero_grad()
        own = batches if distributed.rank() in ranks else []
        with adapter_dropout((model.module for model in models), models[0].device, seed):
            return gradients(method, own, parameters, config)

    outcome = of(range(world))
    if outcome.losses:
        if not outcome.finite:
            loss, norm = outcome.losses["loss"], outcome.norms["grad_norm"]
            whose = first_of(range(world), lambda some: not of(some).finite) if world > 1 else None
            where = "" if whose is None else f", for that of rank {whose}"
            raise NotFinite(f"the loss is {loss} and the gradient norm {norm}{where}")
        before_update()
        optimizer.step()
    method.stepped(outcome.metrics)
    return outcome


def gradients(
    method: Method[Batch],
    batches: Sequence[Batch],
    parameters: Mapping[str, list[nn.Parameter]],
    config: TrainingConfig,
) -> Outcome:
    """Leaves a step's clipped gradients.

    Counts of the whole step and of all ranks come first, so that each sum is divided once.
    """
    device = next(iter(method.trained.values())).device
    counts = distributed.sum_mapping(_total(method.counts(b) for b in batches), device)
    if not counts:
        return Outcome({}, {}, {})
    losses, metrics = _accumulate(method, batches, counts, device)
    norms: dict[str, float] = {}
    for name, group in parameters.items():
        distributed.sum_gradients(group)
        key = f"grad_norm/{name}" if norms else "grad_norm"
        norms[key] = float(optim.clip_gradients(group, config.max_grad_norm))
    return Outcome(losses, metrics, norms)


def _total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for part in parts:
        for name, value in part.items():
            total[name] += value  # type: ignore[assignment]
    return dict(total)


def _accumulate(
    method: Method[Batch],
    batches: Sequence[Batch],
    counts: Mapping[str, float],
    device: torch.device,
    backward: bool = True,
) -> tuple[dict[str, float], dict[str, float]]:
    """Runs the batches, on the device one at a time; returns all ranks' loss terms and metrics."""
    terms: dict[str, Tensor | float] = {}
    sums: dict[str, Tensor | float] = {}
    sizes: dict[str, float] = {}
    models, rounds = list(method.trained.values()), len(batches)
    if any(model.sharded is not None for model in models):
        rounds = max(distributed.gather(rounds))  # of which each rank takes part in all
    for number in range(rounds):
        with in_step(models) as others:
            out = method.loss(batches[number].to(device)) if number < len(batches) else NOTHING
        divided = {name: total / max(counts[name], 1.0) for name, total in out.terms.items()}
        if backward:
            weightless = (0.0 * other.sum() for other in others)
            torch.stack([*divided.values(), *weightless]).sum().backward()
        for name, part in divided.items():
            terms[name] = terms.get(name, 0.0) + part.detach()
        for name, (total, count) in out.metrics.items():
            sums[name] = sums.get(name, 0.0) + (
                total.detach() if isinstance(total, Tensor) else total
            )
            sizes[name] = sizes.get(name, 0.0) + count
    own = {k: float(v) for k, v in terms.items()}
    values = distributed.sum_mapping(own, device)
    if backward and distributed.world() > 1 and not math.isfinite(sum(values.values())):
        finite = distributed.gather(all(map(math.isfinite, own.values())))
        where = ", ".join(str(rank) for rank, sound in enumerate(finite) if not sound)
        raise NotFinite(f"the loss is {sum(values.values())}, for that of rank {where or '?'}")
    totals = distributed.sum_mapping({k: float(v) for k, v in sums.items()}, device)
    sizes = distributed.sum_mapping(sizes, device)
    losses = {"loss": sum(values.values())}
    if len(values) > 1:
        losses |= {f"loss/{name}": value for name, value in values.items()}
    return losses, {name: totals[name] / sizes[name] for name in totals if sizes[name]}


@torch.no_grad()
def evaluate(
    method: Method[Batch], batches: Sequence[Batch], device: torch.device
) -> dict[str, float]:
    """Loss and metrics over held-out batches, by the same sums as in training."""
    if not distributed.any_rank(bool(batches), device):
        return {}
    counts = distributed.sum_mapping(_total(method.counts(b) for b in batches), device)
    values, metrics = _accumulate(method, batches, counts, device, backward=False)
    return values | metrics
