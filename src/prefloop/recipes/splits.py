"""Splits without leaks: what is nearly the same text stays in the same part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

SHARED = 0.5
BANDS, ROWS = 24, 4  # two texts that share 0.5 of their shingles meet in a band 79 times of 100


def near_duplicates(texts: Sequence[str], words: int = 3) -> list[int]:
    """The group of each text, as the place of its first: near duplicates, and theirs, are together.

    Two texts are near duplicates where the Jaccard index of their shingles (runs of `words` words,
    in lower case) is SHARED or more. Candidates are found by MinHash (Broder, 1997) in bands, and
    then compared exactly: a pair of index s is missed with probability (1 - s^4)^24.

    >>> near_duplicates(["A red fox ran home", "a red fox ran home!", "Nothing like it at all"])
    [0, 0, 2]
    """
    shingles = [_shingles(text, words) for text in texts]
    parent = list(range(len(texts)))
    for candidates in _buckets(shingles):
        unlike: list[int] = []  # of this bucket, one of each that is like no other
        for place in candidates:
            for other in unlike:
                a, b = shingles[place], shingles[other]
                if len(a & b) >= SHARED * len(a | b):
                    low, high = sorted((_root(parent, place), _root(parent, other)))
                    parent[high] = low
                    break
            else:
                unlike.append(place)
    return [_root(parent, place) for place in range(len(texts))]


def distinct(texts: Sequence[str], seed: int, words: int = 3) -> list[int]:
    """Places of the texts, shuffled, one of each group of near duplicates."""
    places = sorted(set(near_duplicates(texts, words=words)))
    np.random.default_rng(seed).shuffle(places)
    return places


def split(
    groups: Sequence[int], shares: Mapping[str, float], seed: int, fixed: Mapping[int, str] = {}
) -> dict[str, list[int]]:
    """Places by part: whole groups, in a drawn order, each into the part that most lacks its share.

    `fixed` puts groups into a part beside its share.
    """
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    parts: dict[str, list[int]] = {name: [] for name in shares}
    for group, name in fixed.items():
        parts[name] += members.pop(group)
    drawn = dict.fromkeys(shares, 0)
    order = sorted(members)
    np.random.default_rng(seed).shuffle(order)
    for group in order:
        name = min(shares, key=lambda name: drawn[name] / shares[name])
        parts[name] += members[group]
        drawn[name] += len(members[group])
    return {name: sorted(places) for name, places in parts.items()}


def _shingles(text: str, words: int) -> frozenset[int]:
    """Hashes of the runs of words; of a shorter text, of all its words."""
    found = re.findall(r"\w+", text.lower())
    runs = [" ".join(found[i : i + words]) for i in range(max(1, len(found) - words + 1))]
    return frozenset(
        int.from_bytes(hashlib.blake2b(run.encode(), digest_size=7).digest(), "big") for run in runs
    )


def _buckets(shingles: Sequence[frozenset[int]]) -> list[list[int]]:
    """Places of texts whose MinHash signatures agree in a band."""
    draw = np.random.default_rng(0)
    factors = draw.integers(1, 1 << 31, BANDS * ROWS, dtype=np.uint64) * 2 + 1
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for place, of in enumerate(shingles):
        hashes: NDArray[np.uint64] = np.fromiter(of, dtype=np.uint64, count=len(of))
        signature = (hashes[:, None] * factors).min(axis=0)  # products modulo 2^64
        for band in range(BANDS):
            key = signature[band * ROWS : (band + 1) * ROWS].tobytes()
            buckets.setdefault((band, key), []).append(place)
    return [places for places in buckets.values() if len(places) > 1]


def _root(parent: list[int], place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place
