"""The process group that torchrun starts, and sums over its ranks; alone, rank 0 of 1."""

from __future__ import annotations

import atexit
import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from prefloop.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)
"""Ranks wait so long for each other: longer than one of them samples or judges alone, and short
beside a night in which nothing would happen.
"""
BUCKET = 25 * 2**20  # bytes: enough to be worth a message, and little beside the gradients


def start(device: torch.device, patience: timedelta = PATIENCE) -> None:
    """Joins the process group that torchrun announces, if it does."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # gloo beside NCCL, for rollouts' statistics are summed on the CPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=patience)
        atexit.register(_leave)


def _leave() -> None:
    """Ends the group's threads: a process that exits with them running may abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shares(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Places of `sizes`, divided so that each rank's sizes sum to nearly the same: the largest
    first, each to the rank with the least (Graham 1969, LPT). No rank has two where one has none;
    the places of each ascend.

    >>> shares([2, 2, 5, 3, 2, 3], 2)  # 2 + 2 + 5 and 2 + 3 + 3
    [[0, 2, 4], [1, 3, 5]]
    """
    lightest = [(0, 0, number) for number in range(ranks)]  # size, how many, whose
    found: list[list[int]] = [[] for _ in range(ranks)]
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        size, count, number = lightest[0]
        found[number].append(place)
        heapq.heapreplace(lightest, (size + sizes[place], count + 1, number))
    return [sorted(places) for places in found]


def mine(items: Sequence[T], size: Callable[[T], int]) -> list[T]:
    """This rank's share, by size, of what all ranks hold alike."""
    return [items[place] for place in my_places(map(size, items))]


def my_places(sizes: Iterable[int]) -> list[int]:
    """This rank's of `shares`."""
    return shares(list(sizes), world())[rank()]


def dealt(items: Sequence[T]) -> Sequence[T]:
    """This rank's of what is dealt in turn: every so many-th."""
    return items[rank() :: world()]


def interleaved(own: Sequence[T]) -> list[T]:
    """What all ranks made of what `dealt` gave them, in the order before."""
    parts = gather(own)
    return [parts[place % world()][place // world()] for place in range(sum(map(len, parts)))]


def local_device(name: str) -> str:
    """The name of the rank's own GPU where several ranks share a machine, else `name`."""
    local = os.environ.get("LOCAL_RANK")
    kind, _, index = name.partition(":")
    if local is None or kind not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    if index:
        if ranks > 1:
            raise UserError(f"--device {name} for each of {ranks} processes; give --device cuda")
        return name
    if int(local) >= torch.cuda.device_count():
        raise UserError(
            f"{ranks} processes on this machine and {torch.cuda.device_count()} CUDA devices; "
            "start one process a device"
        )
    return f"cuda:{local}"


def sum_tensor(values: Tensor) -> Tensor:
    """The element-wise sum over ranks, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def sum_mapping(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Key-wise sums over ranks, in float64; ranks may lack some of the keys."""
    if world() == 1:
        return dict(values)
    keys: list[list[str]] = [[] for _ in range(world())]
    dist.all_gather_object(keys, list(values))
    names = sorted({name for part in keys for name in part})
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.tensor([values.get(name, 0.0) for name in names], dtype=dtype, device=device)
    return dict(zip(names, sum_tensor(sums).tolist(), strict=True))


def gather(item: T) -> list[T]:
    """Every rank's item, on every rank."""
    if world() == 1:
        return [item]
    items: list[T | None] = [None] * world()
    dist.all_gather_object(items, item)
    return items  # type: ignore[return-value]


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Sums gradients over ranks, several at a time in one flat tensor of at most BUCKET bytes.

    A rank without a gradient that others have adds zeros; what no rank has stays None, as on one.
    Those of divided weights are sums already (see models/sharding.py).
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if world() == 1 or not parameters:
        return
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    held = sum_tensor(has.to(parameters[0].device)).tolist()
    gradients = []
    for parameter, ranks in zip(parameters, held, strict=True):
        if ranks and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = sum_tensor(torch.cat([gradient.reshape(-1) for gradient in bucket]))
        parts = flat.split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors by type, in their order, at most BUCKET bytes (or one tensor) together."""
    filling: dict[torch.dtype, list[Tensor]] = {}
    room: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype in filling and tensor.nbytes > room[tensor.dtype]:
            yield filling.pop(tensor.dtype)
        if tensor.dtype not in filling:
            filling[tensor.dtype], room[tensor.dtype] = [], BUCKET
        filling[tensor.dtype].append(tensor)
        room[tensor.dtype] -= tensor.nbytes
    yield from filling.values()


def any_of(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Of each flag whether it is set on at least one rank."""
    sums = sum_mapping({str(number): float(flag) for number, flag in enumerate(flags)}, device)
    return [sums[str(number)] > 0 for number in range(len(flags))]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank."""
    return any_of([flag], device)[0]


def barrier() -> None:
    """Waits for the other ranks."""
    if world() > 1:
        dist.barrier()
