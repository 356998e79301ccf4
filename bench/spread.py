"""Medians and ranges of a few repeats of a noisy measurement."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEAST = 7
"""Fewest repeats for a meaningful median."""


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the range from their 5 % to their 95 % quantile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Compute the spread of at least two values, with interpolation."""
        twentieths = statistics.quantiles(values, n=20, method="inclusive")
        return cls(statistics.median(values), twentieths[0], twentieths[-1])

    @property
    def percent(self) -> float:
        """Half of the range, in percent of the median."""
        return 50 * (self.high - self.low) / self.median if self.median else float("inf")

    def meets(self, other: Spread) -> bool:
        """Return whether the two ranges overlap."""
        return self.low <= other.high and other.low <= self.high
