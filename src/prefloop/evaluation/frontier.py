"""The frontier of best-of-n: the reward it reaches and the KL divergence it may cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, log

from prefloop.intervals import Grouped, Interval, bootstrap


def best_of_n_kl(n: int) -> float:
    """Upper bound of KL(best-of-n || base) in nats: log n - (n - 1)/n (arXiv 2401.01879).

    >>> round(best_of_n_kl(4), 4)
    0.6363
    """
    if n < 1:
        raise ValueError(f"best_of_n_kl: n = {n}; at least 1 is needed")
    return log(n) - (n - 1) / n


def best_of_n_weights(proxy: Sequence[float], n: int) -> list[float]:
    """Probability of each of N answers to be the proxy's best in a random subset of n.

    The answer at 0-based rank i from the top leads C(N-1-i, n-1) of the C(N, n) subsets; equal
    proxy scores share their ranks' weight evenly (the estimator of WebGPT, arXiv 2112.09332).
    """
    size = len(proxy)
    if not 1 <= n <= size:
        raise ValueError(f"best_of_n: n = {n} needs 1 <= n <= {size}, the answers per prompt")
    order = sorted(range(size), key=lambda i: -proxy[i])
    by_rank = [comb(size - 1 - i, n - 1) / comb(size, n) for i in range(size)]
    shared: dict[float, list[float]] = {}
    for rank, index in enumerate(order):
        shared.setdefault(proxy[index], []).append(by_rank[rank])
    return [sum(shared[score]) / len(shared[score]) for score in proxy]


def best_of_n(scores: Grouped, proxy: Grouped, n: int, seed: int = 0) -> Interval:
    """Expected score of the proxy's best of n, from N >= n answers to each prompt."""
    return bootstrap(
        [
            sum(w * s for w, s in zip(best_of_n_weights(chosen_by, n), row, strict=True))
            for row, chosen_by in zip(scores, proxy, strict=True)
        ],
        seed,
    )
