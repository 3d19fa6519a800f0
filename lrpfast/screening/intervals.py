"""The intervals that stand beside each number of a finding; all of 95%.

A rate from some dozens of trials is rough, and zero of them is no proof of never: Wilson's interval is honest at both ends, where the
textbook's normal one has no width. A difference of two rates takes Newcombe's, which is built from Wilson's. A mean
of values of unknown shape takes the bootstrap.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

_Z = 1.959963984540054  # of the standard normal, 95% two-sided


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float


def rate(hits: int, trials: int) -> Estimate:
    """A rate with Wilson's interval (Wilson 1927); 0 to 1 for no trials."""
    if trials == 0:
        return Estimate(0.0, 0.0, 1.0)
    share = hits / trials
    middle = (share + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    half = _Z / (1 + _Z**2 / trials) * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    # At the ends Wilson's limits are 0 and 1 exactly, and rounding must not move them past the value.
    return Estimate(share, min(max(0.0, middle - half), share), max(min(1.0, middle + half), share))


def difference(first: Estimate, second: Estimate) -> Estimate:
    """The difference of two independent rates (Newcombe 1998, method 10)."""
    value = first.value - second.value
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(value, low, high)


def mean(values: np.ndarray, seed: int = 0, draws: int = 2000) -> Estimate:
    """A mean [n] with the percentile bootstrap's interval (Efron 1979); unbounded below two values."""
    if len(values) < 2:
        return Estimate(float(values.mean()) if len(values) else 0.0, -math.inf, math.inf)
    rows = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[rows].mean(axis=1), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))
