"""Keep freed memory in the process: what an explanation frees, the next one takes again.

The values of an explanation are tens of megabytes each. glibc gives memory of this size back to the system when it is freed;
every later call then asks for it anew, page by page, each page zeroed by the kernel first: 10 to 40% of an explanation's time.
So its two thresholds are raised, once, when the first program for a CPU is built. The peak is what it was; what is freed after
it stays with the process, for whatever allocates next. LRPFAST_KEEP_MEMORY=0 leaves the allocator alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_INT = 2**31 - 1
_OLD_LARGEST_THRESHOLD = 2**25  # the most that glibc took before 2.35


@functools.cache
def keep_freed_memory() -> str:
    """Raise glibc's thresholds, once in a process; in words, what was done or why nothing was."""
    if os.environ.get("LRPFAST_KEEP_MEMORY") == "0":
        return "freed memory goes back to the system: LRPFAST_KEEP_MEMORY=0"
    if not _is_glibc():
        return "freed memory is left to the C library, which is not glibc"
    mallopt = ctypes.CDLL(None).mallopt
    if not mallopt(_M_MMAP_THRESHOLD, _LARGEST_INT):
        mallopt(_M_MMAP_THRESHOLD, _OLD_LARGEST_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
    return "freed memory is kept for the next explanation (LRPFAST_KEEP_MEMORY=0: given back)"


def give_back_free_memory() -> None:
    """Give the system what is free now: what the making of a program leaves is in pieces too small for an explanation's values."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
