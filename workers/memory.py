"""How a worker holds its memory: what a training step frees stays for the next step, and goes back when the task ends.

glibc by itself asks the kernel anew for every large tensor and returns it when it is freed, so that each step pays for clean
pages again: an embedding's gradient alone is tens of megabytes. `python -m benchmarks.kept_memory` measures what that takes.
"""

from __future__ import annotations

import ctypes
import gc

# From <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
LARGEST = 2**31 - 1


def keep_freed() -> None:
    """From here on, memory that this process frees stays with it. Does nothing where the C library is not glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST)


def give_back() -> None:
    """Return to the system what was freed so far. Does nothing where the C library is not glibc."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
