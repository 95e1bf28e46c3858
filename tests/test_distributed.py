"""Every rank of a machine has its own device."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from prefloop import distributed
from prefloop.errors import UserError
from prefloop.models.load import pick_device


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
