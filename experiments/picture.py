"""Draw the results of contenders against their cost: one question per picture, readable at 700 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import png

COLORS = {"base": "#6b7280", "SAM": "#c2701c", "GAM": "#1f77c9"}
OTHER = "#3a8f5c"


@dataclass(frozen=True)
class Point:
    """A contender.

    Attributes:
        method: sets the colour; ``base`` is the base optimizer.
        error: half the length of the error bar.
    """

    name: str
    method: str
    cost: float
    value: float
    error: float | None = None

    @property
    def color(self) -> str:
        """The colour of the method."""
        return COLORS.get(self.method, OTHER)


def against_cost(points: Sequence[Point], cost: str, value: str, title: str, *, log: bool = False) -> bytes:
    """Draw the points with their names, with a logarithmic cost axis.

    adjustText keeps the names apart; if it is not installed, they are next to their points.

    Args:
        points: at least one.
        cost: label of the cost axis.
        value: label of the value axis.
        title: title of the picture.
        log: whether the value axis is logarithmic too.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for point in points:
        drawn = axes.errorbar(
            point.cost, point.value, yerr=point.error, color=point.color, marker="o", markersize=7, zorder=3
        )
        for bar in drawn[2]:
            bar.set(alpha=0.35, linewidth=2, zorder=1)
    axes.margins(x=0.12, y=0.12)
    axes.set(xscale="log", yscale="log" if log else "linear")
    for axis in (axes.xaxis, axes.yaxis) if log else (axes.xaxis,):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(cost, fontsize=11)
    axes.set_ylabel(value, fontsize=11)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#ddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()  # fixes the positions of the axes
    figure.set_layout_engine("none")
    _name(axes, points)
    return png(figure)


def _name(axes: Any, points: Sequence[Point]) -> None:
    from matplotlib.patheffects import withStroke

    texts = [axes.text(p.cost, p.value, p.name, fontsize=10, color=p.color, zorder=2) for p in points]
    for text in texts:
        text.set_path_effects([withStroke(linewidth=3, foreground="white")])
    try:
        from adjustText import adjust_text
    except ImportError:
        return
    bars = [(p.cost, p.value + part * (p.error or 0.0)) for p in points for part in (-1, -0.5, 0, 0.5, 1)]
    x, y = zip(*bars, strict=True)
    arrows = {"arrowstyle": "-", "color": "#999", "linewidth": 0.7}
    # iterations are counted, not timed: the same picture anywhere
    adjust_text(texts, x, y, ax=axes, iter_lim=500, expand=(1.25, 1.7), force_text=(0.3, 0.5), arrowprops=arrows)
