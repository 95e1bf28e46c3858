"""Every rank of a machine has its own device; gradients are summed over them in few messages."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from prefloop import distributed
from prefloop.errors import UserError
from prefloop.models.load import pick_device
from tests.ranks import on_ranks
from tests.sums_on_rank import GRADIENTS, gradient


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two CUDA devices, of which tensors are only believed to be on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode():
        yield


def device(monkeypatch, name, rank, ranks=2):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    return pick_device(distributed.local_device(name))


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_takes_the_device_of_its_number(name, two_gpus, monkeypatch):
    for rank in (0, 1):
        assert device(monkeypatch, name, rank) == torch.device("cuda", rank)


def test_one_process_takes_what_is_named(two_gpus, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, expected in (("auto", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        assert pick_device(distributed.local_device(name)) == torch.device(expected)
    assert device(monkeypatch, "cuda:1", 0, ranks=1) == torch.device("cuda:1")


def test_ranks_that_would_share_a_device_are_told(two_gpus, monkeypatch):
    with pytest.raises(UserError, match="--device cuda:1 for each of 2 processes"):
        device(monkeypatch, "cuda:1", 1)
    with pytest.raises(UserError, match="4 processes on this machine and 2 CUDA devices"):
        device(monkeypatch, "auto", 2, ranks=4)


def test_ranks_on_the_cpu_share_it(monkeypatch):
    assert device(monkeypatch, "cpu", 1) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device(monkeypatch, "auto", 1) == torch.device("cpu")


@pytest.mark.parametrize(
    ("sizes", "ranks", "expected"),
    [
        # 7, 5 and 4; then 3 beside 4 and 3 beside 5; the ones beside 7 and 7: 8 tokens each
        ([7, 1, 5, 3, 3, 4, 1], 3, [[0, 1], [2, 4], [3, 5, 6]]),
        ([2, 9], 4, [[1], [0], [], []]),
        ([5] * 5, 2, [[0, 2, 4], [1, 3]]),
        ([0] * 4, 2, [[0, 2], [1, 3]]),
        ([3, 1, 2], 1, [[0, 1, 2]]),
        ([], 2, [[], []]),
    ],
)
def test_rows_are_divided_by_size(sizes, ranks, expected):
    assert distributed.shares(sizes, ranks) == expected


def test_gradients_are_summed_as_one_by_one(tmp_path):
    """To the bit; zeros stand in where one rank has none, and what no rank has stays away."""
    outcomes = on_ranks(2, "-m", "tests.sums_on_rank", str(tmp_path))
    assert [code for _, code in outcomes] == [0, 0], outcomes
    (first, weights), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for number, (shape, kind, ranks) in enumerate(GRADIENTS):
        assert torch.equal(weights[number], others[number])  # those rounded at random, too
        assert bool(weights[number].any()) == bool(ranks)
        for mine in (first, second):
            if not ranks:
                assert mine[number] is None
                continue
            expected = sum(gradient(number, rank) for rank in ranks)
            assert (mine[number].shape, mine[number].dtype) == (torch.Size(shape), kind)
            assert torch.equal(mine[number], expected)


def test_buckets_hold_one_type_and_at_most_25_mib():
    sizes = [(3, 1), (5, 1), (20, 1), (4, 2), (30, 1), (1, 1), (1, 2)]  # MiB, kind
    kinds = {1: torch.int8, 2: torch.bfloat16}
    tensors = [
        torch.empty(size * 2**20 // kinds[kind].itemsize, dtype=kinds[kind], device="meta")
        for size, kind in sizes
    ]
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    found = [[places[id(t)] for t in bucket] for bucket in distributed._buckets(tensors)]
    assert sorted(found) == [[0, 1], [2], [3, 6], [4], [5]]
