"""Medians and the range around them: what a few repeats of a noisy measurement say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEAST = 7
"""Repeats that a median needs to mean something."""


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the range from 5 to 95 % of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least two values, interpolated between them."""
        twentieths = statistics.quantiles(values, n=20, method="inclusive")
        return cls(statistics.median(values), twentieths[0], twentieths[-1])

    @property
    def percent(self) -> float:
        """Half of the range, in percent of the median."""
        return 50 * (self.high - self.low) / self.median if self.median else float("inf")

    def meets(self, other: Spread) -> bool:
        """Whether the two ranges have a value in common."""
        return self.low <= other.high and other.low <= self.high
