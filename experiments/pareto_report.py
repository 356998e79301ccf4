"""Show the findings of :mod:`experiments.pareto` as tables and as pictures."""

from __future__ import annotations

from typing import Any

from bench.report import Table, conditions

from .front import Row, front
from .picture import Point, against_cost

FIGURES = {"accuracy": "test accuracy, %", "lambda_max": "λmax", "r1": "R1"}
"""The figures that are compared at each cost, with their headings."""


def plus_minus(value: float | None, error: float | None, digits: int = 2) -> str | None:
    """Format a value and its error with the same number of decimals."""
    if value is None:
        return None
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def flat(row: Row) -> Row:
    """Return a row as tables show it."""
    return {
        **row,
        "accuracy": plus_minus(row["accuracy"], row["accuracy_std"]),
        "to_sam": None if row["to_sam"] is None else f"{row['to_sam']:+.2f}",
        "to_sam_error": row["to_sam_error"],
        "lambda_max": plus_minus(row["lambda_max"], row["lambda_max_std"], 1),
        "r1": plus_minus(row["r1"], row["r1_std"], 3),
    }


def found(task: dict[str, Any]) -> Table:
    """Return the table of results against gradients."""
    columns = {
        "contender": "contender",
        "gradients": "gradients per step",
        "accuracy": "test accuracy, %",
        "to_sam": "− SAM",
        "to_sam_error": "± s.e.",
        "lambda_max": "λmax",
        "r1": "R1",
        "step_ms": "ms per step",
        "cost": "÷ base",
    }
    return Table(f"{task['name']}: {task['about']}", columns, [flat(row) for row in task["rows"]])


def times(task: dict[str, Any]) -> Table:
    """Return the table of times against the prediction from the count of gradients."""
    columns = {
        "contender": "contender",
        "gradients": "gradients per step",
        "cost": "time ÷ base",
        "excess": "÷ predicted",
        "small_batches": "of that small batches",
        "rest": "of that the rest",
    }
    alone = ", ".join(f"{one['share']:g}: {one['ms']:.2f} ms" for one in task["gradient_ms"])
    note = f"forward and backward alone, by share of the batch of {task['batch']}: {alone}"
    return Table(f"{task['name']}: time", columns, task["rows"], [note])


def tables(figures: dict[str, Any]) -> list[Table]:
    """Return two tables for each task."""
    shown = [table for task in figures["tasks"] for table in (found(task), times(task))]
    last = shown[-1]
    return [*shown[:-1], Table(last.title, last.columns, last.rows, [*last.notes, conditions(figures)])]


def fronts(task: dict[str, Any], cost: str) -> dict[str, list[str]]:
    """Return, for each figure, the contenders on the Pareto front."""
    return {
        key: front({row["contender"]: (row[cost], row[key]) for row in task["rows"]}, higher=key == "accuracy")
        for key in FIGURES
    }


DRAWN = {
    "accuracy": ("test accuracy, %", "accuracy"),
    "lambda_max": ("λmax: smaller is flatter", "the curvature of the minimum"),
}
"""The figures drawn against time, one picture per task: label, and words of the title."""


def pictures(figures: dict[str, Any]) -> dict[str, bytes]:
    """Draw each of ``DRAWN`` against time for each task. Keys are ``<task>_<figure>``; bars are standard errors."""
    found = {}
    for task in figures["tasks"]:
        for key, (label, words) in DRAWN.items():
            points = [
                Point(
                    task["base"] if row["contender"] == "base" else row["contender"],
                    row["method"],
                    row["cost"],
                    row[key],
                    None if row[f"{key}_std"] is None else row[f"{key}_std"] / len(figures["seeds"]) ** 0.5,
                )
                for row in task["rows"]
            ]
            title = f"{TITLES.get(task['name'], task['name'])}: {words} for its time"
            cost = f"time of a step ÷ that of {task['base']}"
            found[f"{task['name']}_{key}"] = against_cost(points, cost, label, title, log=key != "accuracy")
    return found


TITLES = {"digits": "Digits, 30 % wrong labels", "clean": "Digits, right labels", "names": "Names, a small transformer"}
