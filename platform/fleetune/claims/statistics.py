"""The statistics of claims: a difference of every seed, and a paired t interval over seeds.

Results are arrays ``[G, S, N]``: G combinations of all else that was swept, S settings that are compared, N seeds; NaN where a
trial has no result. A seed is what is repeated independently: its trials share the partition, the clients that are drawn and
the order of the data. So the pairs of one seed become one number, their mean, and the interval is one over N numbers. Taking
every pair for an independent one would make intervals too narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
"""The share of sweeps whose interval holds the true mean, if seeds differ by normal noise."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, with its confidence interval."""

    mean: float
    low: float
    high: float
    num_seeds: int

    @property
    def half_width(self) -> float:
        """Half of the interval's length: with this spread and so many seeds, a smaller mean would not be told from zero."""
        return (self.high - self.low) / 2

    @property
    def sign(self) -> int:
        """1 if the whole interval lies above zero, -1 if it lies below, else 0."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def interval(values: Floats) -> Interval | None:
    """The paired t interval of N seeds' differences: mean ± t_(N-1) · s / sqrt(N). NaN are left out; None for fewer than two."""
    from scipy.special import stdtrit

    known = values[np.isfinite(values)]
    if len(known) < 2:
        return None
    mean = float(known.mean())
    quantile = float(stdtrit(len(known) - 1, (1 + LEVEL) / 2))
    half = quantile * float(known.std(ddof=1)) / math.sqrt(len(known))
    return Interval(mean, mean - half, mean + half, len(known))


def by_seed(values: Floats) -> Floats:
    """Values of G combinations and N seeds ``[G, N]`` -> each seed's mean over the combinations that it has ``[N]``.

    NaN for a seed that has none.
    """
    counts = np.isfinite(values).sum(axis=0)
    sums = np.nansum(values, axis=0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def differences(results: Floats, first: int, second: int) -> Floats:
    """The first setting's results minus the second's ``[G, N]``."""
    return results[:, first] - results[:, second]


def slopes(results: Floats) -> Floats:
    """The mean change from one setting to the next ``[G, N]``: the slope of a line through the results over 0, 1, … S-1.

    The settings' order counts and not their distance: a growth rate of 2, 4 and 8 has steps of equal size.
    """
    steps = np.arange(results.shape[1]) - (results.shape[1] - 1) / 2
    return np.einsum("s,gsn->gn", steps, results) / float((steps**2).sum())


def log_ratios(results: Floats) -> Floats:
    """The logarithm of the first setting's results over the second's ``[G, N]``; NaN where one is not positive."""
    positive = np.where(results > 0, results, np.nan)
    return np.log(positive[:, 0]) - np.log(positive[:, 1])
