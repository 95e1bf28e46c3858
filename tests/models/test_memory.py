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
import re, torch
from pathlib import Path
from prefloop.models.memory import give_back_holes, keep_freed_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
keep_freed_memory()
tensors = [torch.ones(1 << 18) for _ in range(200)]  # 1 MiB each
del tensors[::2]
before = resident()
give_back_holes()
print(before - resident())
assert all(bool((x == 1).all()) for x in tensors)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_holes_are_given_back_and_what_lies_between_them_stays():
    """Of 200 tensors of 1 MiB every other one was freed, so 100 MiB of pages can go."""
    words = [sys.executable, "-c", HOLES]
    freed = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert 90 * 1024 < freed < 105 * 1024
