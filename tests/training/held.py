"""What a rank holds of PPO's models after a step, in bytes of tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from prefloop import distributed
from prefloop.models.export import export_model
from prefloop.models.four_bits import InBytes
from prefloop.models.sharding import local
from prefloop.training import optim, ppo
from prefloop.training.start import divide, start
from prefloop.training.step import optimizer_step
from tests.training.small import config, policy


def tell_held(world: Path, output: Path, name: str, **changes: Any) -> None:
    """Writes NAME-RANK.json: `weights`, `gradients`, `moments`, and what one rank would hold; of
    a base in 4 bits also its part of both, `base` and `whole_base`: all but one table of numbers.
    """
    chosen = config("ppo", world, output / f"{name}-run", batch_size=4, **changes)
    run, device = start(chosen, "ppo")
    with run:
        method = ppo.build(chosen, device, run)
        parameters = {name: model.trainable() for name, model in method.trained.items()}
        optimizer = optim.build_optimizer(parameters, chosen, method.learning_rates)
        step = next(method.steps(0))
        optimizer_step(method, step.batches, parameters, optimizer, chosen)
    models = [*method.fixed, *method.trained.values()]
    every = {id(p): p for model in models for p in model.hf.parameters()}.values()
    trained = [p for group in parameters.values() for p in group]
    kept = {
        "weights": list(every),
        "gradients": [p.grad for p in trained if p.grad is not None],
        "moments": [optimizer.state[p][m] for p in trained for m in ("exp_avg", "exp_avg_sq")],
    }
    held = {kind: sum(map(bytes_of, tensors)) for kind, tensors in kept.items()}
    held["whole"] = sum(t.numel() * t.element_size() for part in kept.values() for t in part)
    layers = [x for m in models for x in m.hf.modules() if isinstance(x, InBytes)]
    divided = [t for x in dict.fromkeys(layers) for t in (x.weight, x.block_scales)]
    alike = sum(bytes_of(x.form.state2.absmax) for x in dict.fromkeys(layers))
    held["base"] = alike + sum(map(bytes_of, divided))
    held["whole_base"] = alike + sum(t.numel() for t in divided)
    (output / f"{name}-{distributed.rank()}.json").write_text(json.dumps(held))
    distributed.barrier()


def bytes_of(tensor: Tensor) -> int:
    """Of the slice that is here."""
    here = local(tensor.detach())
    return here.numel() * here.element_size()


def export(world: Path, output: Path, name: str, file_bytes: int) -> None:
    """The policy, divided, in files of so many bytes."""
    chosen = config("sft", world, output / f"{name}-run")
    model = policy(world, trained=True)
    distributed.start(model.device)
    divide(chosen, [model])
    export_model(model, output / name, file_bytes)
    distributed.barrier()
