"""Two minima that SAM's measure cannot distinguish but GAM's can: the argument of the paper, as a picture.

In one dimension, around each of two minima, within the radius ρ = 1:

    wide     L(x) = h x²                                  rises slowly and steadily to h at the edge of the ball
    narrow   L(x) = h (1 − exp(−x²/2s²)) / (1 − exp(−1/2s²))   is at h already near the minimum, and flat from there on

Their zeroth-order flatness is the same, R0 = h: it only sees the loss at the edge. The first-order flatness is the
largest gradient in the ball: R1 = 2h for the wide one and (h/s) e^(−1/2) / (1 − exp(−1/2s²)) for the narrow one.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gam_fast import flatness

RHO, HEIGHT, WIDTH = 1.0, 1.0, 0.2


@dataclass(frozen=True)
class Minimum:
    """A loss with its minimum at 0, and its first-order flatness in closed form."""

    name: str
    loss: Callable[[Tensor], Tensor]
    first_order: float


def narrow(x: Tensor) -> Tensor:
    """Return the loss of the narrow minimum."""
    return HEIGHT * (1 - torch.exp(-(x**2) / (2 * WIDTH**2))) / (1 - math.exp(-(RHO**2) / (2 * WIDTH**2)))


MINIMA = (
    Minimum("wide", lambda x: HEIGHT * x**2 / RHO**2, 2 * HEIGHT),
    Minimum("narrow", narrow, RHO * HEIGHT / WIDTH * math.exp(-0.5) / (1 - math.exp(-(RHO**2) / (2 * WIDTH**2)))),
)


def measure(minimum: Minimum) -> tuple[float, float, float, flatness.Slice]:
    """Return R0, R1, the second derivative, and a slice of loss and gradient around the minimum."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    loss = flatness.Loss.from_closure(lambda: minimum.loss(weight).sum(), [weight])
    direction = [torch.ones(1, dtype=torch.float64)]
    zeroth = flatness.zeroth_order_flatness(loss, RHO, restarts=8)
    first = flatness.first_order_flatness(loss, RHO, restarts=8)
    curvature = float(loss.product(direction)[0])
    around = flatness.slice_1d(loss, direction, torch.linspace(-1.3 * RHO, 1.3 * RHO, 201).tolist())
    return zeroth.value, first.value, curvature, around


def picture(slices: dict[str, flatness.Slice], path: Path) -> None:
    """Draw the minima, and write the picture to ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.4), layout="constrained")
    for axis, quantity in zip(axes, ("loss", "gradient_norm"), strict=True):
        flatness.plot_slice(slices, quantity, axes=axis)
        axis.axvspan(-RHO, RHO, color="#8884", zorder=0, label="ball")
        axis.set_xlabel("distance from the minimum")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("R0: the same height at the edge", fontsize=11)
    axes[1].set_title("R1: the steepest place inside", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Print the measures, and draw the minima on request."""
    parser = argparse.ArgumentParser(description="Two minima of equal R0 and different R1.")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="write the picture to PATH (needs matplotlib)")
    arguments = parser.parse_args(argv)
    found = {minimum.name: measure(minimum) for minimum in MINIMA}
    print(f"{'minimum':<10}{'R0':>8}{'R1':>8}{'L″':>8}")
    for name, (zeroth, first, curvature, _) in found.items():
        print(f"{name:<10}{zeroth:>8.3f}{first:>8.3f}{curvature:>8.2f}")
    if arguments.picture:
        picture({name: around for name, (*_, around) in found.items()}, arguments.picture)
        print(f"picture: {arguments.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
