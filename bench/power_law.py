"""Fits of measured times: a power law, and a linear cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PowerLaw:
    """``y = factor · x^slope``, fitted on logarithms.

    Attributes:
        slope: exponent.
        error: its standard error.
        factor: y at x = 1.
        low, high: smallest and largest x of the fit.
    """

    slope: float
    error: float
    factor: float
    low: float
    high: float

    def __call__(self, x: float) -> float:
        """Return y at ``x``."""
        return self.factor * float(x**self.slope)


def fit(x: Sequence[float], y: Sequence[float], low: float, high: float) -> PowerLaw | None:
    """Fit a power law to the points with ``low ≤ x ≤ high``; return ``None`` for fewer than three."""
    import numpy as np

    points = [(a, b) for a, b in zip(x, y, strict=True) if low <= a <= high]
    if len(points) < 3:
        return None
    logarithms = np.log(np.asarray(points, dtype=np.float64))
    (slope, constant), covariance = np.polyfit(logarithms[:, 0], logarithms[:, 1], 1, cov=True)
    inside = [a for a, _ in points]
    return PowerLaw(float(slope), float(covariance[0, 0]) ** 0.5, float(np.exp(constant)), min(inside), max(inside))


def cost_of_each(x: Sequence[float], y: Sequence[float]) -> float:
    """Return b of ``y = a + b x``, fitted with relative errors: the cost of one more."""
    import numpy as np

    slope, _ = np.polyfit(np.asarray(x, dtype=np.float64), np.asarray(y), 1, w=1.0 / np.asarray(y))
    return float(slope)
