"""Compare two runs of a benchmark: find changes that exceed the spread of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import Row, Table
from .spread import Spread

KEYS = ("model", "method")
"""Keys that identify a row."""

TIMES = {"step_ms": "step", "optimizer_ms": "optimizer"}


class ShapeError(ValueError):
    """A file is not a result of this benchmark; the message says why."""


def load(path: Path, benchmark: str) -> dict[str, Any]:
    """Load the figures of an earlier run.

    Raises:
        ShapeError: there are none, or they belong to another benchmark or have another shape.
    """
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShapeError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(figures, dict) or figures.get("benchmark") != benchmark:
        found = figures.get("benchmark", "another program") if isinstance(figures, dict) else "another program"
        raise ShapeError(f"{path} is of {found}: name a file that python -m bench.{benchmark} --json has written")
    try:
        for row in figures["rows"]:
            _key(row)
            for time in TIMES:
                Spread(**row[time])
        dict(figures["setting"])
    except (KeyError, TypeError, ValueError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise ShapeError(f"{path} has rows of another shape ({wrong}): write it anew with this version") from error
    return figures


def compare(old: Row, new: Row) -> Table:
    """Return the ratio new ÷ old of the times of each common row. It is a change if the ranges do not overlap."""
    before = {_key(row): row for row in old["rows"]}
    rows = []
    for row in new["rows"]:
        if _key(row) in before:
            for time, what in TIMES.items():
                past, present = Spread(**before[_key(row)][time]), Spread(**row[time])
                rows.append({**{key: row[key] for key in KEYS}, "what": what, **_change(past, present)})
    return Table("against the earlier run", _COLUMNS, rows, _differences(old, new))


_COLUMNS = {
    "model": "model",
    "method": "method",
    "what": "time of",
    "old": "old, ms",
    "old_spread": "± %",
    "new": "new, ms",
    "new_spread": "± %",
    "ratio": "new ÷ old",
    "change": "change",
}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in KEYS)


def _change(old: Spread, new: Spread) -> dict[str, Any]:
    verdict = "none" if old.meets(new) else "faster" if new.median < old.median else "slower"
    return {
        "old": old.median,
        "old_spread": old.percent,
        "new": new.median,
        "new_spread": new.percent,
        "ratio": new.median / old.median if old.median else float("inf"),
        "change": verdict,
    }


def _differences(old: Row, new: Row) -> list[str]:
    """Return the other differences of two runs, including rows that only one has."""
    facts = {key for key in old.keys() & new.keys() if isinstance(old[key], str | int | float)}
    pairs = [(key, old[key], new[key]) for key in sorted(facts)]
    names = sorted(old["setting"].keys() | new["setting"].keys())
    pairs += [(name, old["setting"].get(name), new["setting"].get(name)) for name in names]
    notes = [f"{name}: was {past}, is {present}" for name, past, present in pairs if past != present]
    for figures, other, when in ((old, new, "earlier"), (new, old, "this")):
        others = {_key(row) for row in other["rows"]}
        only = [" ".join(map(str, _key(row))) for row in figures["rows"] if _key(row) not in others]
        notes += [f"only in the {when} run: {', '.join(only)}"] if only else []
    return notes
