"""Show the findings of :mod:`experiments.pareto` as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.report import Table, conditions, png

from .front import Row, front

FIGURES = {"accuracy": "test accuracy, %", "lambda_max": "λmax", "r1": "R1"}
"""The figures that are drawn against cost, with their headings."""

COSTS = {"gradients": "gradients per step", "step_ms": "ms per step"}

COLORS = {"base": "#8a8f98", "SAM": "#d9822b", "GAM": "#1f77c9"}
MARKERS = {1: "o", 2: "s", 4: "^"}


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


def chart(figures: dict[str, Any]) -> bytes:
    """Draw each figure against both costs, two rows of panels for each task; error bars are standard deviations.

    adjustText keeps the labels apart; if it is not installed, they are next to their points.
    """
    from matplotlib.figure import Figure

    lines = [(task, cost) for task in figures["tasks"] for cost in COSTS]
    figure = Figure(figsize=(15, 3.9 * len(lines) + 0.8), layout="constrained")
    figure.suptitle(conditions(figures), fontsize=9)
    panels = []
    for (task, cost), axes in zip(lines, figure.subplots(len(lines), 3, squeeze=False), strict=True):
        for (key, label), axis in zip(FIGURES.items(), axes, strict=True):
            _panel(axis, task["rows"], cost, key, fronts(task, cost)[key])
            axis.set(xlabel=COSTS[cost], ylabel=label)
            axis.set_title(task["name"], loc="left", fontsize=10)
            panels.append((axis, task["rows"], cost, key))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    figure.draw_without_rendering()  # fixes the positions of the panels
    figure.set_layout_engine("none")
    for panel in panels:
        _label(*panel)
    return png(figure)


def _panel(axis: Any, rows: Sequence[Row], cost: str, key: str, best: Sequence[str]) -> None:
    """Draw the points of all contenders on logarithmic axes for cost and curvature; ring and join the front."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    places = {row["contender"]: (row[cost], row[key]) for row in rows}
    axis.plot(*zip(*(places[name] for name in best), strict=True), color="#555", linewidth=1, linestyle="--", zorder=1)
    for row in rows:
        name = row["contender"]
        axis.errorbar(
            *places[name],
            yerr=row[f"{key}_std"],
            color=COLORS[row["method"]],
            alpha=0.35 + 0.65 * row["share"] ** 0.5,
            marker=MARKERS.get(row["interval"], "D"),
            markersize=7,
            markeredgecolor="none",
            capsize=2,
            linestyle="none",
            label=name,
        )
        if name in best:
            axis.plot(*places[name], marker="o", markersize=11, markerfacecolor="none", color="#555", linewidth=1)
    axis.margins(x=0.08)
    axis.set_xscale("log")
    if key != "accuracy":
        axis.set_yscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.spines[["top", "right"]].set_visible(False)


def _label(axis: Any, rows: Sequence[Row], cost: str, key: str) -> list[Any]:
    """Label each point, away from other points, bars and labels."""
    texts = [axis.text(row[cost], row[key], f" {_short(row)}", fontsize=7, color="#444") for row in rows]
    try:
        from adjustText import adjust_text
    except ImportError:
        return texts
    bars = [(row[cost], row[key] + part * (row[f"{key}_std"] or 0.0)) for row in rows for part in (-1, -0.5, 0, 0.5, 1)]
    x, y = zip(*bars, strict=True)
    arrows = {"arrowstyle": "-", "color": "#999", "linewidth": 0.5}
    # iterations are counted, not timed, so the picture is the same on every machine
    adjust_text(texts, x, y, ax=axis, iter_lim=100, expand=(1.6, 2.0), force_text=(0.3, 0.5), arrowprops=arrows)
    return texts


def _short(row: Row) -> str:
    """Return the name without its method, or the method."""
    return str(row["contender"]).removeprefix(row["method"]).strip() or str(row["method"])
