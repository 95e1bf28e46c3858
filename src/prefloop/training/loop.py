"""THE loop. A method says which batches make a step and what their loss sums are; the loop does the
rest: divides once by the counts of the whole step, clips, steps, logs, evaluates, saves, resumes.
"""

from __future__ import annotations

import math
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from prefloop import distributed
from prefloop.config import TrainingConfig
from prefloop.config.checks import validate
from prefloop.errors import UserError, first_line
from prefloop.models.load import pick_device
from prefloop.models.model import LoadedModel, ModelOptions
from prefloop.models.precision import autocast
from prefloop.runs import Run, newest_checkpoint
from prefloop.training import checkpoint, optim
from prefloop.training.progress import Progress

Batch = TypeVar("Batch")


class LossSums(NamedTuple):
    """What a method makes of one micro-batch: sums only, never means."""

    terms: Mapping[str, Tensor]  # per term: a scalar sum, coefficient included
    metrics: Mapping[str, tuple[Tensor | float, float]]  # per metric: (sum, count)


@dataclass(frozen=True)
class Step(Generic[Batch]):
    """One optimiser step's micro-batches, and what was measured while making them."""

    batches: list[Batch]
    tokens: int  # tokens of this rank's batches
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)


class Method(Protocol[Batch]):
    """A training method: what is trained, the steps, and the loss."""

    @property
    def trained(self) -> Mapping[str, LoadedModel]:
        """Models that take gradients, by name."""
        ...

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        ...

    @property
    def learning_rates(self) -> Mapping[str, float]:
        """Peak learning rates of models whose own is not `config.lr`."""
        ...

    def steps(self, start_step: int) -> Iterator[Step[Batch]]:
        """The optimiser steps after the first `start_step`; each is asked for when it is due."""
        ...

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """What each loss term's sum over the step is divided by: this batch's share."""
        ...

    def loss(self, batch: Batch) -> LossSums:
        """Sums over this batch."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out rows; empty without any."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of what a resumed run must find unchanged: rows, and weights that are not trained."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights and optimiser: tensors and plain values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts it back."""
        ...

    def export(self, folder: Path) -> None:
        """Writes the final model, or models, into the run directory."""
        ...


class Interrupt:
    """Makes a flag of the first SIGINT or SIGTERM, so that the loop can save; the second kills."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupt:
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def train(method: Method[Any], config: TrainingConfig, run: Run) -> None:
    """Trains `method` to its last step and exports it; goes on from the run's checkpoint if any."""
    # 1. What is trained, and where it stands.
    device = next(iter(method.trained.values())).device
    parameters = {name: model.trainable() for name, model in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, config, method.learning_rates)
    done, total_tokens = _resume(method, optimizer, run)
    with Interrupt() as interrupt, Progress(method.total_steps, done) as progress:
        began = time.perf_counter()
        for number, step in enumerate(method.steps(done), start=done + 1):
            # 2. Loss and gradients of the whole step.
            optimizer.zero_grad()
            values, metrics, norms = gradients(method, step.batches, parameters, config)
            _stop_if_not_finite(values["loss"], norms, number, run)
            # 3. The step.
            factor = optim.lr_factor(
                number - 1, method.total_steps, config.warmup, config.lr_schedule
            )
            optim.set_lr(optimizer, factor)
            if distributed.any_rank(bool(step.batches), device):  # PPO's target_kl leaves some out
                optimizer.step()
            # 4. Log, evaluate, save.
            tokens = int(distributed.sum_mapping({"tokens": float(step.tokens)}, device)["tokens"])
            last = number >= method.total_steps
            seconds = time.perf_counter() - began
            line = values | {"lr": config.lr * factor} | norms
            line |= {"tokens_per_second": tokens / seconds} | metrics | dict(step.metrics)
            if (config.eval_every and number % config.eval_every == 0) or last:
                line |= {f"eval/{k}": v for k, v in method.evaluate().items()}
            total_tokens += tokens
            if number % config.log_every == 0 or last or step.metrics:
                run.log_metrics(number, line)
            run.log_samples(number, step.samples)
            progress.advance(number, tokens, line["loss"])
            stop = distributed.any_rank(interrupt.asked, device)
            if (config.save_every and number % config.save_every == 0) or stop or last:
                _save(method, optimizer, run, number, total_tokens, config.keep_checkpoints)
            if stop:
                raise KeyboardInterrupt
            if last:
                break
            began = time.perf_counter()
        # 5. The result; a last checkpoint that was not asked for has then served its time.
        if distributed.rank() == 0:
            method.export(run.directory)
            if not config.save_every:
                checkpoint.remove(run.checkpoint(method.total_steps))
        distributed.barrier()
    run.finish("finished", steps=method.total_steps, tokens=total_tokens)


def start(config: TrainingConfig, command: str) -> tuple[Run, torch.device]:
    """Checks settings, joins the ranks, seeds, opens the run directory, says where to compute."""
    validate(config)
    device = distributed.local_device(pick_device(config.device))
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
        "lora_rank": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "gradient_checkpointing": config.gradient_checkpointing,
    }


def gradients(
    method: Method[Any],
    batches: list[Any],
    parameters: Mapping[str, list[nn.Parameter]],
    config: TrainingConfig,
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Leaves a step's clipped gradients; returns loss terms, metrics and gradient norms.

    Counts of the whole step and of all ranks come first, so that each sum is divided once.
    """
    device = next(iter(method.trained.values())).device
    counts = distributed.sum_mapping(_total(method.counts(b) for b in batches), device)
    values, metrics = _accumulate(method, batches, counts, device, config.dtype)
    norms: dict[str, float] = {}
    for name, group in parameters.items():
        distributed.sum_gradients(group)
        key = f"grad_norm/{name}" if norms else "grad_norm"
        norms[key] = float(optim.clip_gradients(group, config.max_grad_norm))
    return values, metrics, norms


def _total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for part in parts:
        for name, value in part.items():
            total[name] += value  # type: ignore[assignment]
    return dict(total)


def _accumulate(
    method: Method[Any],
    batches: Iterable[Any],
    counts: Mapping[str, float],
    device: torch.device,
    dtype: str,
    backward: bool = True,
) -> tuple[dict[str, float], dict[str, float]]:
    """Runs the batches; returns the step's loss terms and metrics over all ranks."""
    terms: dict[str, Tensor | float] = {}
    sums: dict[str, Tensor | float] = {}
    sizes: dict[str, float] = {}
    for batch in batches:
        with autocast(device, dtype):
            out = method.loss(batch)
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
    method: Method[Any], batches: list[Any], device: torch.device, dtype: str
) -> dict[str, float]:
    """Loss and metrics over held-out batches, by the same sums as in training."""
    if not distributed.any_rank(bool(batches), device):
        return {}
    counts = distributed.sum_mapping(_total(method.counts(b) for b in batches), device)
    values, metrics = _accumulate(method, batches, counts, device, dtype, backward=False)
    return values | metrics


def _stop_if_not_finite(loss: float, norms: Mapping[str, float], number: int, run: Run) -> None:
    if math.isfinite(loss) and all(map(math.isfinite, norms.values())):
        return
    kept = newest_checkpoint(run.directory)
    raise UserError(
        f"step {number}: the loss is {loss} and the gradient norm {norms['grad_norm']}; nothing "
        f"was saved over {kept or 'the start'}; lower --lr, or look for a broken row"
    )


def _save(
    method: Method[Any],
    optimizer: torch.optim.Optimizer,
    run: Run,
    step: int,
    tokens: int,
    keep: int,
) -> None:
    state = {
        "step": step,
        "models": {n: checkpoint.trainable_state(m.module) for n, m in method.trained.items()},
        "optimizer": optimizer.state_dict(),
        "method": method.state_dict(),  # on every rank: it may gather
        "fingerprint": method.fingerprint,
        "rng": checkpoint.rng_state(),
        "tokens": tokens,
    }
    if distributed.rank() == 0:
        checkpoint.save(run.checkpoints, step, state, keep)
    distributed.barrier()


def _resume(method: Method[Any], optimizer: torch.optim.Optimizer, run: Run) -> tuple[int, int]:
    """Puts the run's checkpoint back; returns the steps and tokens done, 0 without one."""
    if run.resume_from is None:
        return 0, 0
    state = checkpoint.load(run.resume_from)
    if state.get("fingerprint") != method.fingerprint:
        raise UserError(
            f"{run.directory}: the rows, or weights that stay fixed (reference, reward model, the "
            "base of LoRA), are not those that the run began with; put them back, or give another "
            "--output"
        )
    if state["step"] > method.total_steps:
        raise UserError(
            f"{run.resume_from}: of step {state['step']}, beyond the {method.total_steps} steps of "
            "this run; raise --max-steps or --epochs, or name an earlier checkpoint"
        )
    try:
        for name, model in method.trained.items():
            checkpoint.load_trainable_state(model.module, state["models"][name])
        optimizer.load_state_dict(state["optimizer"])
        method.load_state_dict(state["method"])
        checkpoint.set_rng_state(state["rng"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{run.resume_from}: not a checkpoint of this run ({first_line(error)}); name another"
        ) from error
    return int(state["step"]), int(state["tokens"])
