"""How the C library's allocator treats the memory of large tensors."""

from __future__ import annotations

import ctypes
import functools
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1


@functools.cache
def keep_freed_memory() -> None:
    """Lets glibc use freed memory again instead of giving it back to the kernel at once.

    Every large tensor would otherwise be fresh memory, which the kernel zeroes page by page: a
    tenth of a training step's time. Other C libraries are left as they are.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, NEVER)
