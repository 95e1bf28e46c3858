"""The row stream: permutations, epoch boundaries, resuming, shards."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from prefloop.data.stream import epoch_order, step_rows, total_steps


def test_every_row_once_an_epoch_and_carried_over_the_boundary() -> None:
    steps = list(step_rows(10, 4, 2.0, 0, seed=3))
    assert [len(step) for step in steps] == [4, 4, 4, 4, 4]
    rows = list(chain(*steps))
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert rows[:10] != rows[10:]


def test_only_the_last_step_may_be_short() -> None:
    assert [len(step) for step in step_rows(10, 4, 1.5, 0, seed=0)] == [4, 4, 4, 3]
    assert [len(step) for step in step_rows(3, 8, 1.0, 0, seed=0)] == [3]


def test_max_steps_decides_where_it_is_set() -> None:
    steps = list(step_rows(3, 8, 1.0, 3, seed=0))
    assert [len(step) for step in steps] == [8, 8, 8]
    assert Counter(chain(*steps)) == {0: 8, 1: 8, 2: 8}
    assert total_steps(3, 8, 1.0, 3) == 3


@pytest.mark.parametrize("start", [0, 1, 5, 8, 99])
def test_any_step_is_reached_without_the_ones_before(start: int) -> None:
    whole = list(step_rows(7, 3, 3.5, 0, seed=11))
    assert len(whole) == total_steps(7, 3, 3.5, 0) == 8  # 24.5 rounds to 24
    assert list(step_rows(7, 3, 3.5, 0, seed=11, start_step=start)) == whole[start:]


def test_the_order_depends_on_the_seed_and_never_changes() -> None:
    # random.Random("0/0").random() gives .3427 .6924 .8308 .3969 .5681 .8007, sorted by hand:
    assert epoch_order(6, 0, 0) == [0, 3, 4, 1, 5, 2]
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_positions_are_uniform() -> None:
    first = Counter(epoch_order(4, seed, 0)[0] for seed in range(2000))
    assert all(abs(first[row] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for row in range(4))


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        next(step_rows(0, 4, 1.0, 0, seed=0))
