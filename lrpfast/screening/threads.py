"""One thread where the work is small: libraries' threads then wait for each other longer than they work, on a busy machine a hundred
times longer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import threadpoolctl


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Hold the libraries that are loaded (BLAS, OpenMP) to one thread each."""
    with _controller().limit(limits=1):
        yield


@functools.cache
def _controller() -> threadpoolctl.ThreadpoolController:
    # To look for the libraries takes as long as to cluster a class.
    return threadpoolctl.ThreadpoolController()
