"""Freed memory is kept: of many large tensors in turn only the first few need new pages."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from prefloop.models.memory import keep_freed_memory
if {keep}: keep_freed_memory()
for _ in range(6): torch.ones(1 << 24)  # as the heap lies, up to the first three grow it
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4): torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_tensors_take_freed_memory():
    def faults(keep):
        words = [sys.executable, "-c", SCRIPT.format(keep=keep)]
        return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)

    pages = (1 << 26) // 4096
    assert faults(True) < 0.5 * pages
    assert faults(False) > 3.5 * pages


HOLES = """
import torch
from prefloop.models.memory import Holes, keep_freed_memory, resident_bytes
keep_freed_memory()
holes = Holes(growth=64 << 20)
holes.give_back()
tensors = [torch.ones(1 << 18) for _ in range({tensors})]  # 1 MiB each
del tensors[::2]
before = resident_bytes()
holes.give_back()
print(before - resident_bytes())
assert all(bool((x == 1).all()) for x in tensors)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("tensors", "low", "high"), [(200, 90, 105), (40, -1, 1)])
def test_holes_are_given_back_and_what_lies_between_them_stays(tensors, low, high):
    """Every other tensor was freed; the process grew by 200 MiB, or by 40 that are too little."""
    words = [sys.executable, "-c", HOLES.format(tensors=tensors)]
    freed = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert low << 20 < freed < high << 20
