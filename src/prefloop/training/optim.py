"""AdamW's parameter groups, the learning-rate schedule and gradient clipping."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefloop import distributed
from prefloop.config import TrainingConfig
from prefloop.models.sharding import local, square_sums
from prefloop.training.adamw import ASKED, BLOCK, FEWEST, AdamW, scale_shape


def build_optimizer(
    modules: Mapping[str, Sequence[nn.Parameter]],
    config: TrainingConfig,
    learning_rates: Mapping[str, float],
) -> AdamW:
    """AdamW as the settings ask; weight decay falls on matrices only."""
    groups: list[dict[str, Any]] = []
    for name, parameters in modules.items():
        peak = learning_rates.get(name, config.lr)
        for decay, chosen in (
            (config.weight_decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": peak, "peak": peak, "weight_decay": decay})
    eight = config.optimizer == "adamw8bit"
    if eight and distributed.rank() == 0:
        large = [p for group in groups for p in group["params"] if p.numel() >= FEWEST]
        if cut := sum(scale_shape(p) is None for p in large):
            print(
                f"{ASKED}: {cut} of {len(large)} weights keep moments of 32 bits, for processes "
                f"would cut their blocks of {BLOCK} elements",
                file=sys.stderr,
            )
    return AdamW(
        groups,
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        bits=8 if eight else 32,
        seed=config.seed,
    )


def lr_factor(
    step: int, total_steps: int, warmup: float, schedule: str, floor: float = 0.0
) -> float:
    """Share of the peak learning rate at `step` (0-based): a linear rise, then the schedule.

    The first step already learns: factor 1/w for w warm-up steps. Linear and cosine fall to `floor`
    at the end of the last step.
    """
    rise = math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)
    if step < rise:
        return (step + 1) / rise
    if schedule == "constant":
        return 1.0
    progress = (step - rise) / max(1, total_steps - rise)
    shape = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return floor + (1.0 - floor) * shape


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Gives each group its peak learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scales gradients down to `max_norm` (0 leaves them) and returns their norm before.

    The norm is of float32 sums, whatever the gradients' type is.
    """
    bound = max_norm if max_norm > 0 else math.inf
    grads = [p.grad for p in parameters if p.grad is not None]
    if any(isinstance(grad, DTensor) for grad in grads):
        norm: Tensor = square_sums(grads).sqrt()
        factor = (bound / (norm + 1e-6)).clamp(max=1.0)  # as torch's own has it
        for grad in grads:
            local(grad).mul_(factor.to(grad.dtype))
        return norm
    if all(grad.dtype == torch.float32 for grad in grads):
        return nn.utils.clip_grad_norm_(parameters, bound)
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    nn.utils.clip_grads_with_norm_(parameters, bound, norm)
    return norm
