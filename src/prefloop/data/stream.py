"""Which rows each optimiser step takes: a pure function of (seed, step), so resuming is easy.

The rows of all epochs form one endless sequence, each epoch a permutation of its own; step t takes
the places t * batch_size .. (t + 1) * batch_size of it, over epoch boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from random import Random


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `count` rows that depends on (seed, epoch) only, in every Python version."""
    # Random.random() is the one method whose sequence Python promises to keep for a given seed.
    random = Random(f"{seed}/{epoch}")
    keys = [random.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def total_steps(count: int, batch_size: int, epochs: float, max_steps: int) -> int:
    """Optimiser steps of a run: `max_steps` where it is set, else what `epochs` passes take.

    >>> total_steps(10, 4, 2.0, 0), total_steps(10, 4, 2.0, 3), total_steps(10, 4, 0.5, 0)
    (5, 3, 2)
    """
    return max_steps or ceil(_places(count, epochs) / batch_size)


def step_rows(
    count: int, batch_size: int, epochs: float, max_steps: int, seed: int, start_step: int = 0
) -> Iterator[list[int]]:
    """Yield the row numbers of each optimiser step from `start_step` on.

    Every step is full, except that the last one of `epochs` passes holds what is left.
    """
    steps = total_steps(count, batch_size, epochs, max_steps)
    end = steps * batch_size if max_steps else _places(count, epochs)
    epoch, order = -1, list[int]()
    for step in range(start_step, steps):
        rows = []
        for place in range(step * batch_size, min((step + 1) * batch_size, end)):
            if place // count != epoch:
                epoch = place // count
                order = epoch_order(count, seed, epoch)
            rows.append(order[place % count])
        yield rows


def _places(count: int, epochs: float) -> int:
    """Rows seen in `epochs` passes, at least one."""
    if count < 1:
        raise ValueError("no rows to step through")
    return max(1, round(count * epochs))
