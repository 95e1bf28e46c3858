"""Seconds, ceilings and memory of a device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch.nn.functional import linear

from benchmarks.cuda.scale import Scale
from prefloop.models.model import LoadedModel
from prefloop.training.bare_models import weights_of
from prefloop.training.tracing import WEIGHTS, Ledger, Part


def settle(device: torch.device) -> None:
    """Waits for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Gives memory back, and forgets its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Of allocated memory since `free`; None where nobody counts it."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    settle(device)
    start = time.perf_counter()
    run()
    settle(device)
    return time.perf_counter() - start


def seconds(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median of a few calls after a first one."""
    run()
    return median(timed(run, device) for _ in range(rounds))


def product_rate(scale: Scale, device: torch.device) -> float:
    """FLOP/s of large bfloat16 products."""
    side, count = scale.product, 10
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    spent = seconds(lambda: [linear(x, x) for _ in range(count)], device, 3)
    return 2 * side**3 * count / spent


def bandwidth(scale: Scale, device: torch.device) -> float:
    """Bytes/s of a large copy, read and written."""
    a = torch.zeros(scale.copied, device=device, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds(lambda: b.copy_(a), device, 3)


@contextmanager
def capped(device: torch.device, most: float) -> Iterator[None]:
    """Within it, torch's allocator has at most this many bytes of a GPU, gaps included."""
    if device.type != "cuda":
        yield
        return
    free(device)
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, most / whole), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class Watch:
    """Bytes of all tensors at their peak: a GPU's as its allocator counts them, others' one by one.

    `load` is the peak until `begin`, and `steps` the peak since; `reserved` has the allocator's
    gaps in it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.ledger, self.within = device, Ledger(), ExitStack()
        self.load = self.steps = self.reserved = 0

    def __enter__(self) -> Watch:
        if self.device.type == "cuda":
            self.before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.within.enter_context(self.ledger)
            self.ledger.enter_stage("load")
        return self

    def begin(self, models: Sequence[LoadedModel]) -> None:
        """All is loaded; now come the steps."""
        gc.collect()
        self.load = self._peak("load")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        for tensor in chain.from_iterable(weights_of(model.module) for model in models):
            self.ledger.claim(tensor, Part("", WEIGHTS))
        self.ledger.enter_stage("steps")

    def __exit__(self, *_: object) -> None:
        self.steps = self._peak("steps")
        if self.device.type == "cuda":
            self.reserved = torch.cuda.max_memory_reserved(self.device)
        self.within.close()

    def _peak(self, stage: str) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return sum(self.ledger.peaks.get(stage, {}).values())
