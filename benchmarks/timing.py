"""Timing of alternatives that are to be compared: in one process, interleaved, warmed up, as medians.

One round calls every variant once, so a slow spell of the machine falls on all of them; the order rotates from round to round, so
none always runs in the cache that the same other one left. What a variant needs before it can run is done before the first round.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call took, round by round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles, as a fraction of the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / self.median


def interleaved(variants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Call every variant once a round for `rounds` rounds after `warmup` uncounted ones; seconds by variant."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            variants[name]()
            end = time.perf_counter()
            if turn >= warmup:
                seconds[name].append(end - begin)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
