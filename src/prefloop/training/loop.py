"""THE loop. A method says which batches make a step and what their loss sums are; the loop does the
rest: divides once by the counts of the whole step, clips, steps, logs, evaluates, saves, resumes.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prefloop import distributed
from prefloop.config import TrainingConfig
from prefloop.config.checks import validate
from prefloop.config.ranges import template_arguments
from prefloop.models.load import pick_device
from prefloop.models.model import ModelOptions
from prefloop.models.weights import storage_of
from prefloop.runs import Run, newest_checkpoint
from prefloop.training import checkpoint, optim
from prefloop.training.adamw import require_bitsandbytes
from prefloop.training.interrupt import Interrupt
from prefloop.training.keeper import Keeper, NotFinite, Owed
from prefloop.training.method import Batch, Method, Step
from prefloop.training.progress import Progress


class Outcome(NamedTuple):
    """What a step gave, over all ranks; all empty where no rank had a batch."""

    losses: dict[str, float]  # `loss`, and its terms where there are several
    metrics: dict[str, float]
    norms: dict[str, float]  # of the gradients of each trained model, before clipping


def train(method: Method[Any], config: TrainingConfig, run: Run) -> None:
    """Trains `method` to its last step and exports it; goes on from the run's checkpoint if any."""
    # 1. What is trained, and where it stands.
    device = next(iter(method.trained.values())).device
    parameters = {name: model.trainable() for name, model in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, config, method.learning_rates)
    keeper = Keeper(method, optimizer, run, config)
    done, tokens, owed = keeper.resume()
    total = method.total_steps
    with Interrupt() as interrupt, Progress(total, done) as progress, keeper:
        if owed is not None:  # the step was done, but not what follows it
            _report(method, config, run, done, owed)
            keeper.note(done, tokens)
        began = time.perf_counter()
        steps = islice(method.steps(done), total - done)
        for number, item in enumerate(steps, start=done + 1):
            # 2. The step.
            factor = optim.lr_factor(
                number - 1, total, config.warmup, config.lr_schedule, config.lr_floor
            )
            optim.set_lr(optimizer, factor)
            try:
                found = step(method, item.batches, parameters, optimizer, config, keeper.forget)
            except NotFinite as error:
                kept = newest_checkpoint(run.directory) or "the start"
                told = f"step {number}: {error}; nothing was saved over {kept}; lower --lr, or "
                raise NotFinite(told + "look for a broken row") from None
            size = int(distributed.sum_mapping({"tokens": float(item.tokens)}, device)["tokens"])
            tokens += size
            owed = Owed(_line(config, found, item, factor, size / (time.perf_counter() - began)),
                        item.samples, bool(item.metrics))  # fmt: skip
            keeper.note(number, tokens, owed)
            # 3. Log, evaluate, save.
            _report(method, config, run, number, owed)
            keeper.note(number, tokens)
            progress.advance(number, size, found.losses.get("loss"))
            stop, terminated, old = distributed.any_of(
                (interrupt.asked, interrupt.terminated, keeper.is_old()), device
            )
            regular = bool(config.save_every) and number % config.save_every == 0
            if regular or old or stop or number == total:
                keeper.save()
            if stop:
                raise interrupt.error(terminated)
            began = time.perf_counter()
        # 4. The result; checkpoints that were not asked for have then served their time.
        if distributed.rank() == 0:
            method.export(run.directory)
            if not config.save_every:
                checkpoint.remove_all(run.checkpoints)
        distributed.barrier()
    run.finish("finished", steps=total, tokens=tokens)


def _line(
    config: TrainingConfig, found: Outcome, item: Step[Any], factor: float, rate: float
) -> dict[str, float]:
    """A step's line of metrics.jsonl; without loss and norms where nothing was learnt."""
    line = found.losses | {"lr": config.lr * factor} | found.norms
    return line | {"tokens_per_second": rate} | found.metrics | dict(item.metrics)


def _report(method: Method[Any], config: TrainingConfig, run: Run, number: int, owed: Owed) -> None:
    """Evaluates and logs what step `number` gave, as the settings ask."""
    line, last = dict(owed.line), number == method.total_steps
    if (config.eval_every and number % config.eval_every == 0) or last:
        line |= {f"eval/{k}": v for k, v in method.evaluate().items()}
    if number % config.log_every == 0 or last or owed.log:
        run.log_metrics(number, line)
    run.log_samples(number, owed.samples)


def start(config: TrainingConfig, command: str) -> tuple[Run, torch.device]:
    """Checks settings, joins the ranks, seeds, opens the run directory, says where to compute."""
    validate(config)
    require_bitsandbytes(config.optimizer)
    device = pick_device(distributed.local_device(config.device))
    distributed.start(device)
    torch.manual_seed(config.seed)
    random.seed(config.seed)  # ours take none of these two; a user's reward function may
    np.random.seed(config.seed % 2**32)
    if distributed.world() > 1:  # every rank sees the directory as it was before the first writes
        run = Run.open(config, command, writes=False)
        distributed.barrier()
        if distributed.rank() > 0:
            return run, device
    run = Run.open(config, command)
    run.record["device"] = str(device)
    return run, device


def model_options(config: TrainingConfig) -> ModelOptions:
    """What of the settings concerns the loading of a trained model."""
    return {
        "storage": storage_of(config),
        "trained": True,
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "gradient_checkpointing": config.gradient_checkpointing,
        "template_args": template_arguments(config.template_args),
    }


def step(
    method: Method[Any],
    batches: Sequence[Any],
    parameters: Mapping[str, list[nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    before_update: Callable[[], None] = lambda: None,
) -> Outcome:
    """One optimiser step on this rank's batches; the method hears of its metrics.

    `before_update` is called when weights are about to change. Where the loss or a gradient is not
    finite, NotFinite is raised and they do not. Where no rank has a batch nothing is done.
    """
    optimizer.zero_grad()
    found = gradients(method, batches, parameters, config)
    if found.losses:
        loss = found.losses["loss"]
        if not all(map(math.isfinite, (loss, *found.norms.values()))):
            norm = found.norms["grad_norm"]
            raise NotFinite(f"the loss is {loss} and the gradient norm {norm}")
        before_update()
        optimizer.step()
    method.stepped(found.metrics)
    return found


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
    batches: Iterable[Batch],
    counts: Mapping[str, float],
    device: torch.device,
    backward: bool = True,
) -> tuple[dict[str, float], dict[str, float]]:
    """Runs the batches, on the device one at a time; returns all ranks' loss terms and metrics."""
    terms: dict[str, Tensor | float] = {}
    sums: dict[str, Tensor | float] = {}
    sizes: dict[str, float] = {}
    for batch in batches:
        out = method.loss(batch.to(device))
        divided = {name: total / max(counts[name], 1.0) for name, total in out.terms.items()}
        if backward:
            torch.stack(list(divided.values())).sum().backward()
        for name, part in divided.items():
            terms[name] = terms.get(name, 0.0) + part.detach()
        for name, (total, count) in out.metrics.items():
            sums[name] = sums.get(name, 0.0) + (
                total.detach() if isinstance(total, Tensor) else total
            )
            sizes[name] = sizes.get(name, 0.0) + count
    values = distributed.sum_mapping({k: float(v) for k, v in terms.items()}, device)
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
