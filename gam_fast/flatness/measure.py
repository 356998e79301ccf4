"""Compute all measures at once; give them as a table or JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .ascent import Flatness, first_order_flatness, zeroth_order_flatness
from .curvature import (
    Eigenvalues,
    SpectralDensity,
    Trace,
    hessian_eigenvalues,
    hessian_trace,
    spectral_density,
)
from .loss import Loss
from .vectors import norm


@dataclass(frozen=True)
class Measurement:
    """Result of :func:`measure`.

    Attributes:
        parameters: number of elements of the parameters.
        loss: L(θ).
        gradient_norm: ‖∇L(θ)‖.
        zeroth_order: R0 for each radius.
        first_order: R1 for each radius.
        eigenvalues: the largest eigenvalues of the Hessian; ``None`` if not requested.
        trace: trace of the Hessian; ``None`` if not requested.
        density: density of its eigenvalues; ``None`` if not requested.
    """

    parameters: int
    loss: float
    gradient_norm: float
    zeroth_order: tuple[Flatness, ...]
    first_order: tuple[Flatness, ...]
    eigenvalues: Eigenvalues | None
    trace: Trace | None
    density: SpectralDensity | None

    def rows(self) -> list[tuple[str, str, str]]:
        """Return name, value and remark of each quantity, for a table."""
        rows = [
            ("loss", f"{self.loss:.6g}", f"{self.parameters:,} parameters"),
            ("gradient norm", f"{self.gradient_norm:.4g}", ""),
        ]
        for name, found in (("R0", self.zeroth_order), ("R1", self.first_order)):
            rows += [(f"{name}, ρ = {one.rho:g}", f"{one.value:.6g}", _facts(one)) for one in found]
        if self.eigenvalues is not None:
            pairs = zip(self.eigenvalues.values, self.eigenvalues.residuals, strict=True)
            for i, (value, residual) in enumerate(pairs, start=1):
                rows.append((f"λ{i}", f"{value:.6g}", f"residual {residual:.1e}"))
        if self.trace is not None:
            error = "no error estimate" if self.trace.error is None else f"± {self.trace.error:.2g}"
            rows.append(
                ("trace", f"{self.trace.value:.6g}", "exact" if self.trace.products >= self.parameters else error)
            )
        if self.density is not None:
            low, high = self.density.extremes
            rows.append(("spectrum", f"{low:.4g} … {high:.4g}", f"{self.density.steps} steps of Lanczos' method"))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers, for JSON, without points and eigenvectors."""

        def plain(value: Any, leave_out: str) -> Any:
            if value is None:
                return None
            return {k: finite(v) for k, v in vars(value).items() if k != leave_out}

        def finite(value: Any) -> Any:
            if isinstance(value, tuple):
                return [finite(entry) for entry in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {
            "parameters": self.parameters,
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "zeroth_order_flatness": [plain(found, "point") for found in self.zeroth_order],
            "first_order_flatness": [plain(found, "point") for found in self.first_order],
            "hessian_eigenvalues": plain(self.eigenvalues, "vectors"),
            "hessian_trace": plain(self.trace, ""),
            "spectral_density": plain(self.density, ""),
        }


def measure(
    loss: Loss,
    rho: float | Sequence[float] = 0.1,
    *,
    eigenvalues: int = 1,
    trace_samples: int = 30,
    density_steps: int = 0,
    restarts: int = 3,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> Measurement:
    """Measure flatness for each radius, top eigenvalues, trace and, with ``density_steps``, the spectral density.

    The first-order ascents have one more start besides their ``restarts``: the end of the zeroth-order ascent.

    Args:
        loss: see :class:`Loss`.
        rho: one radius or several, in units of the parameters.
        eigenvalues: number of top eigenvalues; 0 leaves them out. They, trace and density need the extra ``flatness``.
        trace_samples: Hessian-vector products for the trace; 0 leaves it out.
        density_steps: steps of Lanczos' method for the spectral density; 0 leaves it out.
        restarts: see :func:`zeroth_order_flatness`.
        max_iterations: see :func:`zeroth_order_flatness`.
        tolerance: see :func:`zeroth_order_flatness`.
        seed: seed of all random numbers.
        progress: show bars (needs tqdm).

    Raises:
        ValueError: an argument out of range; or a loss that differs between two evaluations at the same parameters.
        ImportError, SecondDerivativeError, RuntimeError: see the functions it calls.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    >>> loss = Loss.from_closure(lambda: (torch.tensor([4.0, 1.0]) * weight**2).sum() / 2, [weight])
    >>> found = measure(loss, rho=0.5)
    >>> print(f"{found.first_order[0].value:.3f} {found.eigenvalues.values[0]:.3f} {found.trace.value:.3f}")
    1.000 4.000 5.000
    """
    radii = tuple(rho) if isinstance(rho, Sequence) else (rho,)
    for name, count in (
        ("eigenvalues", eigenvalues),
        ("trace_samples", trace_samples),
        ("density_steps", density_steps),
    ):
        if count < 0:
            raise ValueError(f"{name} must not be negative, got {count}")
    loss.check()
    value, grads = loss.gradient()
    options = {"restarts": restarts, "max_iterations": max_iterations, "tolerance": tolerance}
    common = {"seed": seed, "progress": progress}
    zeroth: tuple[Flatness, ...] = ()
    for r in radii:  # the maximum in a smaller ball is a start in a larger one
        smaller = [found.point for found in zeroth if found.rho < r][-1:]
        zeroth += (zeroth_order_flatness(loss, r, starts=smaller, **options, **common),)  # type: ignore[arg-type]
    first = tuple(
        first_order_flatness(loss, found.rho, starts=[found.point], **options, **common)  # type: ignore[arg-type]
        for found in zeroth
    )

    def wanted(number: int, make: Callable[[], Any]) -> Any:
        return make() if number else None

    k = min(eigenvalues, loss.size)
    return Measurement(
        loss.size,
        value,
        norm(grads),
        zeroth,
        first,
        wanted(k, lambda: hessian_eigenvalues(loss, k, seed=seed, progress=progress)),
        wanted(trace_samples, lambda: hessian_trace(loss, samples=trace_samples, seed=seed, progress=progress)),
        wanted(density_steps, lambda: spectral_density(loss, steps=density_steps, seed=seed, progress=progress)),
    )


def _facts(found: Flatness) -> str:
    state = "converged" if found.converged else f"residual {found.residual:.1e}"
    if len(found.starts) < 2 or not found.value > 0:
        return state
    return f"{state}, {len(found.starts)} starts within {100 * (1 - min(found.starts) / found.value):.2g} %"
