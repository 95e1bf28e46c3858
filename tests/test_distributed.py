"""Sums over ranks, on one process and on two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from prefloop import distributed

CPU = torch.device("cpu")
SOURCE = Path(__file__).parents[1] / "src"
ON_TWO = """
import torch
from prefloop import distributed as d
cpu = torch.device("cpu")
d.start(cpu)
d.start(cpu)  # a second run in the same process joins nothing anew
r = d.rank()
assert d.world() == 2
assert list(d.mine(range(5))) == [[0, 2, 4], [1, 3]][r]
assert d.sum_tensor(torch.tensor([1.0, r])).tolist() == [2.0, 1.0]
# Keys that one rank lacks, in another order, and sums that float32 would round.
own = [{"a": 2.0**30, "b": 1.0}, {"c": 5.0, "a": 1.0}][r]
assert d.sum_mapping(own, cpu) == {"a": 2.0**30 + 1, "b": 1.0, "c": 5.0}
assert d.sum_mapping({}, cpu) == {}
assert d.any_rank(r == 1, cpu) and not d.any_rank(False, cpu)
assert d.gather({"rank": r}) == [{"rank": 0}, {"rank": 1}]
# A rank that saw no row has no gradient.
p = torch.nn.Parameter(torch.zeros(2))
if r == 0:
    (p * torch.tensor([1.0, 3.0])).sum().backward()
d.sum_gradients([p])
assert p.grad.tolist() == [1.0, 3.0]
d.barrier()
"""


def test_alone_everything_is_rank_0_of_1():
    distributed.start(CPU)
    assert (distributed.rank(), distributed.world()) == (0, 1)
    assert list(distributed.mine([3, 4])) == [3, 4]
    assert distributed.sum_tensor(torch.tensor(2.0)) == 2
    assert distributed.sum_mapping({"a": 1.5}, CPU) == {"a": 1.5}
    assert distributed.gather("x") == ["x"]
    assert distributed.any_rank(True, CPU)
    assert not distributed.any_rank(False, CPU)
    parameter = torch.nn.Parameter(torch.ones(1))
    distributed.sum_gradients([parameter])
    assert parameter.grad is None
    distributed.barrier()


def test_two_ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ON_TWO],
            env=os.environ | common | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=200)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
