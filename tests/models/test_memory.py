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
