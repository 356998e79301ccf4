"""Draw the loss around the minima that SGD, SAM and GAM find on the digits of ``digits.py``: two minutes, two pictures.

Slices go along the direction of largest curvature, the first eigenvector of the Hessian, and along a random direction
that is scaled by the weights. The surfaces are over the plane of the first two eigenvectors. Distances along
eigenvectors are distances of the parameters, so that the three methods are comparable.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import digits
import torch
from digits_report import COLORS
from torch import nn

from gam_fast import flatness

METHODS = ("SGD", "SAM", "GAM")
REACH = 0.3
"""The reach of slices and surfaces along eigenvectors. Along a random direction it is the length of the weights."""

LEVELS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Contour levels of the rise of the loss."""


@dataclass(frozen=True)
class Around:
    """The loss around one minimum, over the training set in eval mode."""

    lambda_max: float
    steepest: flatness.Slice
    random: flatness.Slice
    surface: flatness.Surface


def spaced(reach: float, count: int) -> list[float]:
    """Return offsets from ``-reach`` to ``reach``."""
    return [float(offset) for offset in torch.linspace(-reach, reach, count)]


def look(name: str, data: digits.Digits, epochs: int, seed: int, points: int) -> Around:
    """Train by one method, and evaluate the loss around the minimum, at ``points`` along each axis of the plane."""
    method = next(method for method in digits.METHODS if method.name == name)
    trainer = digits.Trainer(method, seed, replace(digits.Setting(), epochs=epochs), data)
    for _ in range(epochs):
        trainer.epoch()
    loss = flatness.Loss(trainer.model.eval(), nn.CrossEntropyLoss(), [(data.train_x, data.train_y)])
    found = flatness.hessian_eigenvalues(loss, 2)
    first, second = found.vectors
    line = spaced(REACH, points)
    return Around(
        found.values[0],
        flatness.slice_1d(loss, first, spaced(REACH, 2 * points - 1)),
        flatness.slice_1d(loss, flatness.filter_normalised_direction(loss, seed), spaced(1.0, 2 * points - 1)),
        flatness.slice_2d(loss, first, second, (line, line)),
    )


def draw_slices(around: dict[str, Around], path: Path) -> None:
    """Draw the loss along both directions, one line per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    kinds = {"steepest": "the steepest direction", "random": "a random direction"}
    for axes, (kind, title) in zip(panels, kinds.items(), strict=True):
        axes.set_prop_cycle(color=[COLORS[name] for name in around])
        flatness.plot_slice({name: getattr(found, kind) for name, found in around.items()}, axes=axes)
        axes.set_title(f"along {title}", loc="left", fontsize=11)
        axes.set(xlabel="distance from the minimum", ylabel="")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=10)
    panels[0].set_ylabel("training loss")
    panels[1].set_xlabel("distance ÷ length of the filters")
    figure.savefig(path, dpi=120)


def draw_surfaces(around: dict[str, Around], path: Path) -> None:
    """Draw the rise of the loss over the plane, with the same contours for each method."""
    from matplotlib.colors import BoundaryNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    panels = figure.subplots(1, len(around), sharex=True, sharey=True)
    norm = BoundaryNorm(LEVELS, 256, extend="max")
    for axes, (name, found) in zip(panels, around.items(), strict=True):
        rows, columns = found.surface.offsets
        values = torch.tensor(found.surface.loss)
        rise = (values - values[len(rows) // 2, len(columns) // 2]).clamp(min=0.0).T
        filled = axes.contourf(rows, columns, rise, levels=LEVELS, norm=norm, cmap="viridis", extend="max")
        axes.plot(0, 0, "+", color="white", markersize=9)
        axes.set_title(f"{name}, λmax = {found.lambda_max:.0f}", fontsize=11)
        axes.set_aspect("equal")
        axes.set_xlabel("1st eigenvector")
    panels[0].set_ylabel("2nd eigenvector")
    figure.colorbar(filled, ax=panels, label="rise of the loss", ticks=LEVELS)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Train, and write the pictures."""
    parser = argparse.ArgumentParser(description="The loss around the minima of SGD, SAM and GAM on digits.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=17, help="along each axis of the plane (default: %(default)s)")
    parser.add_argument("--slices", type=Path, metavar="PATH", default=Path("slices.png"))
    parser.add_argument("--surfaces", type=Path, metavar="PATH", default=Path("landscape.png"))
    given = parser.parse_args(argv)
    data = digits.load_digits(digits.Setting().wrong_labels)
    around = {}
    for name in METHODS:
        around[name] = look(name, data, given.epochs, given.seed, given.points)
        print(f"{name}: λmax {around[name].lambda_max:.1f}", flush=True)
    draw_slices(around, given.slices)
    draw_surfaces(around, given.surfaces)
    print(f"pictures: {given.slices}, {given.surfaces}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
