"""Plot spectra and slices with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .curvature import Eigenvalues, SpectralDensity
from .extra import require
from .slices import Slice, Surface

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {"loss": "loss", "gradient_norm": "norm of the gradient"}


def plot_spectrum(
    spectra: SpectralDensity | Mapping[str, SpectralDensity],
    *,
    eigenvalues: Eigenvalues | None = None,
    floor: float = 1e-6,
    axes: Axes | None = None,
) -> Axes:
    """Plot the eigenvalue density of the Hessian on a logarithmic scale; of several losses by name.

    Args:
        spectra: one spectrum, or several by name.
        eigenvalues: drawn as ticks on the axis.
        floor: the lowest density to show.
        axes: axes to draw on; ``None`` makes new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes = _axes(axes)
    named = {"": spectra} if isinstance(spectra, SpectralDensity) else spectra
    for name, spectrum in named.items():
        (line,) = axes.semilogy(spectrum.grid, [max(value, floor) for value in spectrum.density], label=name or None)
        axes.fill_between(
            spectrum.grid, floor, [max(v, floor) for v in spectrum.density], alpha=0.15, color=line.get_color()
        )
    if eigenvalues is not None:
        axes.plot(eigenvalues.values, [floor] * len(eigenvalues.values), "|", color="black", markersize=12)
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density", ylim=(floor, None))
    if any(named):
        axes.legend(frameon=False)
    return axes


def plot_slice(
    slices: Slice | Mapping[str, Slice], quantity: str = "loss", *, log: bool = False, axes: Axes | None = None
) -> Axes:
    """Plot the loss (or ``quantity="gradient_norm"``) along a direction; of several losses by name.

    Args:
        slices: one slice, or several by name.
        quantity: ``"loss"`` or ``"gradient_norm"``.
        log: whether the scale is logarithmic.
        axes: axes to draw on; ``None`` makes new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an unknown quantity.
    """
    _check(quantity)
    axes = _axes(axes)
    named = {"": slices} if isinstance(slices, Slice) else slices
    for name, found in named.items():
        axes.plot(found.offsets, getattr(found, quantity), label=name or None)
    axes.set(xlabel="offset", ylabel=LABELS[quantity], yscale="log" if log else "linear")
    if any(named):
        axes.legend(frameon=False)
    return axes


def plot_surface(
    surface: Surface, quantity: str = "loss", *, levels: int | Sequence[float] = 20, axes: Axes | None = None
) -> Axes:
    """Plot the loss (or ``quantity="gradient_norm"``) over a plane, as filled contours; a cross marks θ.

    Args:
        surface: a result of :func:`slice_2d`.
        quantity: ``"loss"`` or ``"gradient_norm"``.
        levels: number of contour levels, or the levels.
        axes: axes to draw on; ``None`` makes new ones.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an unknown quantity.
    """
    _check(quantity)
    axes = _axes(axes)
    rows, columns = surface.offsets
    filled = axes.contourf(columns, rows, getattr(surface, quantity), levels=levels)
    axes.figure.colorbar(filled, ax=axes, label=LABELS[quantity])
    axes.plot(0.0, 0.0, "x", color="white")
    axes.set(xlabel="offset along the second direction", ylabel="offset along the first")
    return axes


def _check(quantity: str) -> None:
    if quantity not in LABELS:
        raise ValueError(f"quantity must be one of {', '.join(map(repr, LABELS))}, got {quantity!r}")


def _axes(axes: Axes | None) -> Axes:
    if axes is not None:
        return axes
    new: Axes = require("matplotlib.pyplot", "a picture").subplots(layout="constrained")[1]
    return new
