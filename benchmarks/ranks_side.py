"""One process of benchmarks.ranks, by torchrun: `-m benchmarks.ranks_side SETTINGS FOLDER`."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from prefloop import distributed, provenance
from prefloop.config import SFTConfig
from prefloop.config.resolve import build
from prefloop.models.load import load_policy
from prefloop.models.sharding import local
from prefloop.training import optim
from prefloop.training.full_rows import full_row
from prefloop.training.sft import SFT
from prefloop.training.start import divide, model_options
from prefloop.training.step import optimizer_step

STEPS = 2  # after the first


def main(text: str, folder: str) -> None:
    """Train, and write what this process held and what all did."""
    config, device = build(SFTConfig, json.loads(text), "SETTINGS"), torch.device("cpu")
    distributed.start(device)
    before = _now()
    policy = load_policy(config.model, device, **model_options(config))
    divide(config, [policy])
    rows = [full_row(config)] * config.batch_size * (STEPS + 1)
    method = SFT(config, policy, rows, [])
    parameters = {name: model.trainable() for name, model in method.trained.items()}
    optimizer = optim.build_optimizer(parameters, config, method.learning_rates)
    began, tokens = 0.0, 0.0
    for number, step in enumerate(method.steps(0)):
        if number == 1:  # the first has made the moments and warmed up
            gc.collect()
            provenance.reset_peak_memory()
            distributed.barrier()
            began = time.perf_counter()
        outcome = optimizer_step(method, step.batches, parameters, optimizer, config)
        assert outcome.losses
        tokens += step.tokens if number else 0
    seconds = time.perf_counter() - began
    trained = [p for group in parameters.values() for p in group]
    found = {
        "rate": distributed.sum_mapping({"tokens": tokens}, device)["tokens"] / seconds,
        "weights": _bytes(policy.module.parameters()),
        "gradients": _bytes(p.grad for p in trained if p.grad is not None),
        "moments": _bytes(s for p in trained for s in optimizer.state[p].values()),
        "memory": provenance.peak_memory_gib() * 2**30 - before,
    }
    Path(folder, f"{distributed.rank()}.json").write_text(json.dumps(found))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """In this process."""
    return sum(local(tensor).nbytes for tensor in tensors if isinstance(tensor, Tensor))


def _now() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main(*sys.argv[1:])
