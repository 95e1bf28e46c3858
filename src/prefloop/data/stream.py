"""Which rows each optimiser step takes: a pure function of (seed, step), so resuming is easy.

The rows of all epochs form one endless sequence, each epoch a permutation of its own; step t takes
the places t * batch_size .. (t + 1) * batch_size of it, over epoch boundaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil
from random import Random


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """A permutation of `count` rows that depends on (seed, epoch) only, in every Python version."""
    # Random.random() is the one method whose sequence Python promises to keep for a given seed.
    return _permutation(count, f"{seed}/{epoch}")


def mixed_order(parts: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> list[int]:
    """Row numbers of an epoch that draws from several sources by weight.

    `parts` says of each row which source it comes from. An epoch has as many rows as there are.
    Each source gives its weight's share of them (rounded by largest remainders) and goes on where
    it stopped in the epoch before: all of its rows come, in an order of their own, before one
    comes again.

    >>> sorted(mixed_order([0, 0, 0, 1], [1, 3], 0, 0))  # one row of source 0, three times row 3
    [2, 3, 3, 3]
    """
    rows: list[int] = []
    for part, share in enumerate(_shares(len(parts), weights)):
        own = [row for row, whose in enumerate(parts) if whose == part]
        turn, order = -1, list[int]()
        for place in range(epoch * share, (epoch + 1) * share):
            if place // len(own) != turn:
                turn = place // len(own)
                order = _permutation(len(own), f"{seed}/{turn}/{part}")
            rows.append(own[order[place % len(own)]])
    return [rows[place] for place in epoch_order(len(rows), seed, epoch)]


def _shares(count: int, weights: Sequence[float]) -> list[int]:
    """`count` divided by weight, in whole numbers: by largest remainders, earlier ones first."""
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for part in by_remainder[: count - sum(shares)]:
        shares[part] += 1
    return shares


def _permutation(count: int, key: str) -> list[int]:
    random = Random(key)
    keys = [random.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def total_steps(count: int, batch_size: int, epochs: float, max_steps: int) -> int:
    """Optimiser steps of a run: `max_steps` where it is set, else what `epochs` passes take.

    >>> total_steps(10, 4, 2.0, 0), total_steps(10, 4, 2.0, 3), total_steps(10, 4, 0.5, 0)
    (5, 3, 2)
    """
    return max_steps or ceil(_places(count, epochs) / batch_size)


def step_rows(
    count: int,
    batch_size: int,
    epochs: float,
    max_steps: int,
    seed: int,
    start_step: int = 0,
    order_of: Callable[[int], list[int]] | None = None,
) -> Iterator[list[int]]:
    """Yield the row numbers of each optimiser step from `start_step` on.

    `order_of` gives the order of an epoch; by default it is `epoch_order`'s.

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
                order = order_of(epoch) if order_of else epoch_order(count, seed, epoch)
            rows.append(order[place % count])
        yield rows


def _places(count: int, epochs: float) -> int:
    """Rows seen in `epochs` passes, at least one."""
    if count < 1:
        raise ValueError("no rows to step through")
    return max(1, round(count * epochs))
