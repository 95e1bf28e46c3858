"""How the C library's allocator and the kernel treat the memory of large tensors."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "determinism_check": "none"}
"""How torch's `checkpoint` is called; its check would look at devices, which planning makes up."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1
MADV_DONTNEED = 4  # mman.h
GROWTH = 1 << 29  # bytes of holes that are worth new pages


@functools.cache
def keep_freed_memory() -> None:
    """Lets glibc use freed memory again instead of giving it back to the kernel at once.

    Every large tensor would otherwise be fresh memory, which the kernel zeroes page by page: a
    tenth of a training step's time. Other C libraries are left as they are.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, NEVER)


class Holes:
    """Freed memory that lies between what is held; given back to the kernel as the process grows.

    Micro-batches differ in size, so that the largest tensors fit into no hole and the heap grows.
    Pages given back are new when they are used again, so this is not for every step.
    """

    def __init__(self, growth: int = GROWTH) -> None:
        self.growth, self.least = growth, 0  # bytes held after the last time

    def give_back(self) -> None:
        """Gives them back once the process has grown by `growth` bytes, or an eighth."""
        if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "malloc_trim"):
            return
        if resident_bytes() > self.least + max(self.growth, self.least // 8):
            library.malloc_trim(0)
            self.least = resident_bytes()


def resident_bytes() -> int:
    """Memory that this process holds, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def file_mappings() -> list[tuple[int, int]]:
    """Addresses (first, beyond) at which this process has safetensors files mapped."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    lines = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
    spans = [words[0].split("-") for words in lines if words[-1].endswith(".safetensors")]
    return [(int(first, 16), int(beyond, 16)) for first, beyond in spans]


def release_pages(tensor: Tensor, mappings: list[tuple[int, int]]) -> None:
    """Lets the kernel take back the memory of a weight that was read from a mapped file.

    For one that nobody writes: it would read the file's bytes again.
    """
    first, size, page = tensor.data_ptr(), tensor.nbytes, mmap.PAGESIZE
    if not any(low <= first and first + size <= beyond for low, beyond in mappings):
        return
    start = -(-first // page) * page  # whole pages only: the others hold neighbours' bytes, too
    if (length := (first + size) // page * page - start) > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_DONTNEED)
