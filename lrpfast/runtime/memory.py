"""Keep freed memory in the process: what an explanation frees, the next one takes again.

The values of an explanation are tens of megabytes each. glibc gives memory of this size back to the system when it is freed;
every later call then asks for it anew, page by page, each page zeroed by the kernel first: 10 to 40% of an explanation's time.
So its two thresholds are raised, once, when the first program for a CPU is built. The peak is what it was; what is freed after
it stays with the process, for whatever allocates next, but for the first run of a size (`Executor.settle`). LRPFAST_KEEP_MEMORY=0
leaves the allocator alone.

While a program is made it is the other way round: what its weights are derived through is freed at once, in pieces that nothing will
ask for again, and would stand between the values of explanations. There each large piece is taken from the system and given back.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_INT = 2**31 - 1
_OLD_LARGEST_THRESHOLD = 2**25  # the most that glibc took before 2.35
_LARGE_PIECE = 2**18


@functools.cache
def keep_freed_memory() -> str:
    """Raise glibc's thresholds, once in a process; in words, what was done or why nothing was."""
    if os.environ.get("LRPFAST_KEEP_MEMORY") == "0":
        return "freed memory goes back to the system: LRPFAST_KEEP_MEMORY=0"
    if not _is_glibc():
        return "freed memory is left to the C library, which is not glibc"
    _keep_up_to(_LARGEST_INT)
    _mallopt()(_M_TRIM_THRESHOLD, _LARGEST_INT)
    return "freed memory is kept for the next explanation (LRPFAST_KEEP_MEMORY=0: given back)"


@contextmanager
def give_back_large_pieces(device: torch.device) -> Iterator[None]:
    """While a program for a CPU is made, give freed memory back at once; afterwards keep it, see `keep_freed_memory`."""
    if not _is_ours(device):
        yield
        return
    keep_freed_memory()
    _mallopt()(_M_MMAP_THRESHOLD, _LARGE_PIECE)
    try:
        yield
    finally:
        _keep_up_to(_LARGEST_INT)


def give_back_free_memory(device: torch.device) -> None:
    """Give the system what is free once a program for a CPU was made: pieces too small for an explanation's values."""
    if _is_ours(device):
        ctypes.CDLL(None).malloc_trim(0)


def _is_ours(device: torch.device) -> bool:
    """Whether programs for a device are made with the allocator told what to keep."""
    return device.type == "cpu" and os.environ.get("LRPFAST_KEEP_MEMORY") != "0" and _is_glibc()


def _keep_up_to(size: int) -> None:
    if not _mallopt()(_M_MMAP_THRESHOLD, size):
        _mallopt()(_M_MMAP_THRESHOLD, _OLD_LARGEST_THRESHOLD)


def _mallopt() -> Callable[[int, int], int]:
    return ctypes.CDLL(None).mallopt


@functools.cache
def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
