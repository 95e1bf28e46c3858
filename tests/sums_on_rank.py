"""One rank of several: sums gradients over the ranks, takes a step, and writes what it holds.

`python -m tests.sums_on_rank FOLDER` with torchrun's variables set.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from prefloop import distributed
from prefloop.training.adamw import AdamW

GRADIENTS = [  # shape, type, ranks that have one
    ((3,), torch.float32, (0, 1)),
    ((distributed.BUCKET // 4 + 5,), torch.float32, (0, 1)),  # fills a bucket alone
    ((40, 50), torch.float32, (0, 1)),
    ((7,), torch.float32, ()),
    ((30,), torch.bfloat16, (0, 1)),
    ((11,), torch.float32, (1,)),
    ((2, 2), torch.bfloat16, (0,)),
]


def gradient(number: int, rank: int) -> torch.Tensor | None:
    """Of a rank's parameter; the matrix's does not lie in the order of its elements."""
    shape, kind, ranks = GRADIENTS[number]
    if rank not in ranks:
        return None
    values = torch.randn(shape, generator=torch.Generator().manual_seed(2 * number + rank))
    return values.t().contiguous().t().to(kind) if len(shape) > 1 else values.to(kind)


def main() -> None:
    distributed.start(torch.device("cpu"))
    rank, parameters = distributed.rank(), []
    for number, (shape, kind, _) in enumerate(GRADIENTS):
        parameters.append(torch.nn.Parameter(torch.zeros(shape, dtype=kind)))
        parameters[-1].grad = gradient(number, rank)
    distributed.sum_gradients(parameters)
    AdamW([{"params": parameters}], lr=1e-3, betas=(0.9, 0.999), eps=1e-8).step()
    held = [p.grad for p in parameters], [p.detach() for p in parameters]
    torch.save(held, Path(sys.argv[1]) / f"{rank}.pt")


if __name__ == "__main__":
    main()
