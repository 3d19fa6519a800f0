"""Splitting: a batch that does not fit a device's memory is run in halves, until it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from lrpfast.errors import MemoryLimitError

T = TypeVar("T")
Part = tuple[int, int]


def run_parts(run: Callable[[int, int], T], parts: Iterable[Part], divisible: bool = True) -> list[T]:
    """``run(begin, end)`` of all parts, in order; one that runs out of memory is split, and those after it as well.

    Parameters
    ----------
    run
        Runs samples `begin` up to `end`.
    parts
        Parts to begin with.
    divisible
        Whether a part may be split.

    Raises
    ------
    MemoryLimitError
        A sample alone does not fit, or a part that may not be split; the message says what ran before.
    """
    waiting = list(parts)
    results: list[T] = []
    largest = 0
    while waiting:
        begin, end = waiting.pop(0)
        try:
            results.append(run(begin, end))
            largest = max(largest, end - begin)
            continue
        except torch.OutOfMemoryError as error:
            size = end - begin
            if size <= 1 or not divisible:
                fits = f"a batch of {largest} fitted before" if largest else "no smaller batch is possible"
                raise MemoryLimitError(
                    f"explaining {'one sample' if size <= 1 else f'a batch of {size}'} takes more memory than the device has "
                    f"left; {fits}. Free memory there, or use a smaller model, input or precision. {error}"
                ) from error
        # Outside of the except clause: the exception's traceback holds on to what the failed run had allocated.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = -(-(end - begin) // 2)
        waiting = [part for b, e in [(begin, end), *waiting] for part in _cut(b, e, half)]
    return results


def _cut(begin: int, end: int, size: int) -> list[Part]:
    return [(b, min(end, b + size)) for b in range(begin, end, size)]
