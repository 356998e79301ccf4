"""One step of SGD, SAM and GAM on a loss of two parameters, as a picture: where each gradient is taken, and why.

The loss is a bowl, four times as steep in one direction as in the other. SGD descends along the gradient at θ. SAM
takes the gradient uphill of θ. GAM moves to where the gradient grows fastest, along the steep direction, and takes two
more gradients there. So its step descends more in that direction. All points come from the optimizers themselves.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import gam_fast

START = (1.4, 0.45)
RATE = 0.12
RHO, RHO_PRIME = 0.45, 0.2

METHODS = {
    "SGD: one gradient": (gam_fast.Base, {}),
    "SAM: two": (gam_fast.SAM, {"rho": RHO}),
    "GAM: four": (
        gam_fast.GAM,
        {"rho": RHO, "rho_prime": RHO_PRIME, "alpha": 0.3, "beta": 0.3, "gamma": 0.1},
    ),
}

NAMES = {
    1: ["θ"],
    2: ["θ", "θ + ρ ĝ₀"],
    4: ["θ", "θ + ρ' ĝ₀", "θ₂ = θ + ρ ĥ₀", "θ₂ + ρ' ĝ₂"],
}
"""The points of the gradients, by their number."""


def loss_at(x: Tensor, y: Tensor) -> Tensor:
    """Return ½ (x² + 4 y²)."""
    return (x**2 + 4 * y**2) / 2


@dataclass(frozen=True)
class Path2D:
    """The points and gradients of the passes, and the end of the step."""

    points: list[Tensor]
    gradients: list[Tensor]
    end: Tensor


def step(method: type[gam_fast.SharpnessAwareOptimizer], hyper: dict[str, float]) -> Path2D:
    """Take one step from START, and record the points of the passes."""
    weight = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = method([weight], torch.optim.SGD, lr=RATE, **hyper)  # type: ignore[arg-type]
    points, gradients = [], []
    for _ in optimizer.passes():
        points.append(weight.detach().clone())
        loss_at(*weight).backward()
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
    return Path2D(points, gradients, weight.detach().clone())


def picture(paths: dict[str, Path2D], file: Path) -> None:
    """Draw the paths, and write the picture to ``file``."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(paths), figsize=(8.4, 4.0), layout="constrained", sharey=True)
    x, y = torch.meshgrid(torch.linspace(0.0, 2.2, 150), torch.linspace(-0.35, 1.45, 150), indexing="xy")
    for axes, (name, path) in zip(panels, paths.items(), strict=True):
        axes.contour(x, y, loss_at(x, y), levels=[0.02 * k**2 for k in range(1, 20)], colors="#8887", linewidths=0.8)
        for k, point in enumerate(path.points[1:]):  # θ2 is drawn from θ, the other points from the one before
            origin = path.points[0 if k == 1 else k]
            axes.plot(*torch.stack([origin, point]).T, ":", color="#555", linewidth=1.2)
        for k, (point, gradient, label) in enumerate(
            zip(path.points, path.gradients, NAMES[len(path.points)], strict=True)
        ):
            color = f"C{k}"
            axes.annotate(
                "",
                xy=(point + 0.06 * gradient).tolist(),
                xytext=point.tolist(),
                arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 2},
            )
            axes.plot(*point, "o", color=color, label=f"{label}: g{'₀₁₂₃'[k]}")
        start = path.points[0]
        axes.annotate(
            "",
            xy=path.end.tolist(),
            xytext=start.tolist(),
            arrowprops={"arrowstyle": "-|>", "color": "black", "linewidth": 2.5},
        )
        axes.plot(*path.end, "s", color="black", label="after the step")
        axes.set_title(name, fontsize=12)
        axes.set(xlim=(0.0, 2.2), ylim=(-0.35, 1.45), aspect="equal", xticks=[], yticks=[])
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), fontsize=10, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Print the points, and draw them on request."""
    parser = argparse.ArgumentParser(description="One step of SGD, SAM and GAM on a loss of two parameters.")
    parser.add_argument("--picture", type=Path, metavar="PATH", help="write the picture to PATH (needs matplotlib)")
    arguments = parser.parse_args(argv)
    paths = {name: step(*method) for name, method in METHODS.items()}
    for name, path in paths.items():
        print(name)
        for label, point, gradient in zip(NAMES[len(path.points)], path.points, path.gradients, strict=True):
            print(
                f"  {label:<16} ({point[0]:6.3f}, {point[1]:6.3f})   gradient ({gradient[0]:6.3f}, {gradient[1]:6.3f})"
            )
        print(f"  {'after the step':<16} ({path.end[0]:6.3f}, {path.end[1]:6.3f})")
    if arguments.picture:
        picture(paths, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
