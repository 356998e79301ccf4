"""Figures of contenders over seeds, their Pareto fronts, and the criteria to check."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .runs import Contender, Run

Row = dict[str, Any]

CHEAP = "GAM .5 /3"
"""The contender of at most 1.5 gradients that should be as good as SAM at 2; chosen on the tuning seeds."""

CLOSE = "GAM .5 /2"
"""The contender of at most 1.75 gradients that should be close to GAM at 4; chosen likewise."""

WALL = 1.15
"""The largest allowed ratio of measured to predicted time of a step."""


def front(points: Mapping[str, tuple[float, float]], *, higher: bool) -> list[str]:
    """Return the Pareto front of (cost, value): no other is better at no more cost, or as good at less; cheapest first.

    >>> front({"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (2.0, 6.0), "d": (3.0, 6.0)}, higher=True)
    ['a', 'c']
    """
    sign = 1.0 if higher else -1.0
    found: list[str] = []
    best = float("-inf")
    for name, (_, value) in sorted(points.items(), key=lambda item: (item[1][0], -sign * item[1][1])):
        if sign * value > best:
            found.append(name)
            best = sign * value
    return found


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation; ``None`` for one value."""
    return statistics.stdev(values) if len(values) > 1 else None


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean difference of paired values, and its standard error."""
    apart = [value - other for value, other in zip(values, others, strict=True)]
    error = spread(apart)
    return statistics.mean(apart), None if error is None else error / len(apart) ** 0.5


def rows(
    runs: Iterable[Run],
    contenders: Sequence[Contender],
    settings: Mapping[str, Any],
    gradient_ms: Mapping[float, float],
) -> list[Row]:
    """Return one row per contender of a task, the base first.

    Accuracy, λmax and R1 are means over seeds, with standard deviations. ``to_sam`` is the mean difference in accuracy
    from SAM of the same seed, with its standard error. ``cost`` is the time of a step over the base's of the same seed,
    as a median over seeds. ``excess`` is the cost over the gradients per step. ``small_batches`` is the part of the
    excess by which forward and backward of a share of the batch, timed alone, exceed that share of the time. ``rest``
    is the remainder: the optimizer, and the alternation of two batch sizes.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.contender, []).append(run)
    base, sam = by_name["base"], by_name.get("SAM")
    found = []
    for contender in contenders:
        own = by_name[contender.name]
        accuracy = [run.accuracy for run in own]
        gradients = statistics.mean(run.gradients for run in own)
        cost = statistics.median(run.step_ms / other.step_ms for run, other in zip(own, base, strict=True))
        base_ms = statistics.median(run.step_ms for run in base)
        timed = (base_ms + contender.ascents * gradient_ms[contender.share]) / base_ms
        row: Row = {
            "contender": contender.name,
            "method": contender.method,
            "share": contender.share,
            "interval": contender.interval,
            "settings": dict(settings.get(contender.name, {})),
            "gradients": gradients,
            "accuracy": statistics.mean(accuracy),
            "accuracy_std": spread(accuracy),
            "loss": statistics.mean(run.loss for run in own),
            "step_ms": statistics.median(run.step_ms for run in own),
            "cost": cost,
            "excess": cost / gradients,
            "small_batches": timed / gradients,
            "rest": cost / timed,
            "to_sam": None,
            "to_sam_error": None,
        }
        for key in ("lambda_max", "r1"):
            values = [getattr(run, key) for run in own]
            row |= {key: statistics.mean(values), f"{key}_std": spread(values)}
        if sam is not None and contender.name != "SAM":
            row["to_sam"], row["to_sam_error"] = difference(accuracy, [run.accuracy for run in sam])
        found.append(row)
    return found


@dataclass(frozen=True)
class Criterion:
    """A criterion on the digits, and the result."""

    claim: str
    found: str
    is_met: bool


def beats_sam(row: Row, sam: Row) -> bool:
    """Return whether accuracy is at or above SAM's, and λmax below."""
    return bool(row["accuracy"] >= sam["accuracy"] and row["lambda_max"] < sam["lambda_max"])


def near_gam(row: Row, gam: Row) -> bool:
    """Return whether accuracy is at most one standard deviation below GAM's, and λmax at most 1.3 times GAM's."""
    least = gam["accuracy"] - (gam["accuracy_std"] or 0.0)
    return bool(row["accuracy"] >= least and row["lambda_max"] <= 1.3 * gam["lambda_max"])


def needed() -> tuple[str, ...]:
    """Return the contenders that the criteria need."""
    return ("base", "SAM", "GAM", CHEAP, CLOSE)


def check(table: Sequence[Row]) -> list[Criterion]:
    """Check the criteria on rows of the digits, for the two settings chosen before, not for the best of all."""
    by_name = {row["contender"]: row for row in table}
    sam, gam, cheap, close = (by_name[name] for name in needed()[1:])
    slowest = max((cheap, close), key=lambda row: float(row["excess"]))
    return [
        Criterion(
            f"{CHEAP}: at most 1.5 gradients a step, accuracy at or above SAM's, λmax below SAM's",
            f"{cheap['gradients']:.2f} gradients; accuracy {cheap['accuracy']:.2f} against {sam['accuracy']:.2f}; "
            f"λmax {cheap['lambda_max']:.1f} against {sam['lambda_max']:.1f}",
            cheap["gradients"] <= 1.5 and beats_sam(cheap, sam),
        ),
        Criterion(
            f"{CLOSE}: at most 1.75 gradients a step, accuracy within one standard deviation of GAM's, λmax within 1.3 "
            "times GAM's",
            f"{close['gradients']:.2f} gradients; accuracy {close['accuracy']:.2f} against {gam['accuracy']:.2f} ± "
            f"{gam['accuracy_std'] or 0.0:.2f}; λmax {close['lambda_max']:.1f} against {gam['lambda_max']:.1f}",
            close["gradients"] <= 1.75 and near_gam(close, gam),
        ),
        Criterion(
            f"{CHEAP} and {CLOSE}: time within {WALL} times what the count of gradients predicts",
            f"{slowest['contender']} takes {slowest['excess']:.2f} times as long: {slowest['small_batches']:.2f} by "
            f"small batches, {slowest['rest']:.2f} by the rest",
            slowest["excess"] <= WALL,
        ),
    ]
