"""The Hessian of a loss: eigenvalues, trace, spectral density, by curvlinops and SciPy on Hessian-vector products."""

from __future__ import annotations

import math
import operator as operators
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .extra import counting, require
from .loss import Loss
from .vectors import flat, norm, plus, random, split, wide

DENSE = 32
"""Up to this many parameters, the whole Hessian is computed: Krylov methods need more dimensions than steps."""

WHICH = ("LA", "SA", "LM")
TRACE_METHODS = ("hutchinson", "xtrace")


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues of the Hessian, with error bounds.

    Attributes:
        values: in descending order (``"LM"``: of the absolute value), in units of the loss by parameters squared.
        residuals: ‖H v − λ v‖ for each; the Hessian has an eigenvalue within that distance of λ.
        products: number of Hessian-vector products used.
        vectors: unit eigenvectors, each with one tensor per parameter.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    products: int
    vectors: tuple[tuple[Tensor, ...], ...] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace of the Hessian.

    Attributes:
        value: the estimate, in units of the loss by parameters squared.
        error: its standard error, 0 where the trace is exact or all samples agree; ``None`` if the method gives none.
        products: number of Hessian-vector products used.
    """

    value: float
    error: float | None
    products: int


@dataclass(frozen=True)
class SpectralDensity:
    r"""A smoothed density of eigenvalues, :math:`\frac1N \sum_i δ(λ − λ_i)`: its integral is 1.

    Attributes:
        grid: values of λ.
        density: density at each λ, per unit of λ.
        extremes: the smallest and the largest eigenvalue that Lanczos' method found; it finds the extremes first.
        steps: number of steps of Lanczos' method.
        products: number of Hessian-vector products used.
    """

    grid: tuple[float, ...] = field(repr=False)
    density: tuple[float, ...] = field(repr=False)
    extremes: tuple[float, float]
    steps: int
    products: int


def hessian(loss: Loss, tick: Callable[[], None] = lambda: None) -> Any:
    """Return the Hessian as a ``curvlinops`` linear operator, for its and SciPy's methods (``.to_scipy()``).

    Unlike ``curvlinops.HessianLinearOperator`` it accepts everything that :class:`Loss` accepts: any ``loss_fn``,
    closures, frozen statistics. For many products, use it inside ``with loss.measuring():``.

    Args:
        loss: see :class:`Loss`.
        tick: called after each product.

    Raises:
        ImportError: curvlinops is not installed.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> loss = Loss.from_closure(lambda: (weight**3).sum(), [weight])
    >>> hessian(loss) @ torch.tensor([1.0, 1.0])
    tensor([ 6., 12.])
    """
    base = require("curvlinops._torch_base", "the Hessian as a linear operator").PyTorchLinearOperator
    shapes = [tuple(param.shape) for param in loss.params]

    class Hessian(base):  # type: ignore[misc, valid-type]  # an optional package
        SELF_ADJOINT = True
        device = loss.params[0].device
        dtype = wide(loss.params[0].dtype)
        products = 0

        def _matmat(self, matrix: list[Tensor]) -> list[Tensor]:
            columns = []
            for k in range(matrix[0].shape[-1]):
                columns.append(loss.product([x[..., k] for x in matrix]))
                self.products += 1
                tick()
            kept = (torch.stack(entries, -1) for entries in zip(*columns, strict=True))
            return [x.to(self.device, self.dtype) for x in kept]

    return Hessian(shapes, shapes)


def hessian_eigenvalues(
    loss: Loss,
    k: int = 1,
    *,
    which: str = "LA",
    tolerance: float = 1e-3,
    max_iterations: int = 300,
    seed: int = 0,
    progress: bool = False,
) -> Eigenvalues:
    """Compute ``k`` eigenvalues of the Hessian of ``loss`` and their eigenvectors, by Lanczos' method (ARPACK).

    A multiple eigenvalue is found as often as it occurs: for k > 1, further runs look beside the eigenvectors found.

    Args:
        loss: see :class:`Loss`.
        k: number of eigenvalues.
        which: ``"LA"``, the largest; ``"SA"``, the smallest; ``"LM"``, the largest in absolute value.
        tolerance: largest residual, relative to the eigenvalue (or to a typical one, for an eigenvalue near 0).
        max_iterations: iterations of ARPACK before it gives up, each of about ten products.
        seed: seed of the start vector.
        progress: show a bar (needs tqdm).

    Raises:
        ImportError: curvlinops or SciPy is not installed.
        RuntimeError: ARPACK did not converge.
        SecondDerivativeError: the loss cannot be differentiated twice.
        ValueError: an argument out of range.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64))
    >>> loss = Loss.from_closure(lambda: (weight**3).sum(), [weight])
    >>> [round(value, 6) for value in hessian_eigenvalues(loss, 2).values]
    [12.0, 6.0]
    """
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(map(repr, WHICH))}, got {which!r}")
    if not 1 <= k <= loss.size:
        raise ValueError(f"k must be between 1 and {loss.size}, the number of parameters, got {k}")
    loss.check()
    with loss.measuring(), counting(progress, "Hessian eigenvalues") as tick:
        operator = hessian(loss, tick)
        if loss.size <= DENSE or k > loss.size - 2:
            found, vectors = torch.linalg.eigh(_dense(operator))
        else:
            found, vectors = _lanczos(loss, operator, k, which, tolerance, max_iterations, seed)
        key = found.abs() if which == "LM" else -found if which == "SA" else found
        order = torch.argsort(key, descending=True)[:k]
        values = found[order].tolist()
        if which == "SA":
            order, values = order.flip(0), values[::-1]
        kept = [split(vectors[:, i], loss.params) for i in order.tolist()]
        residuals = [norm(plus(loss.product(v), v, -value)) for v, value in zip(kept, values, strict=True)]
        return Eigenvalues(tuple(values), tuple(residuals), operator.products + k, tuple(map(tuple, kept)))


def hessian_trace(
    loss: Loss, *, samples: int = 30, method: str = "hutchinson", seed: int = 0, progress: bool = False
) -> Trace:
    """Estimate the trace of the Hessian; it is exact if ``samples`` is at least the number of parameters.

    Args:
        loss: see :class:`Loss`.
        samples: Hessian-vector products to spend.
        method: ``"hutchinson"``, the mean of ``samples`` products with random signs, with its standard error; or
            ``"xtrace"`` (Epperly, Tropp, Webber 2024), which is usually much more precise if few eigenvalues dominate,
            and holds ``2 · samples`` vectors at once.
        seed: seed of the random vectors.
        progress: show a bar (needs tqdm).

    Raises:
        ImportError: curvlinops is not installed.
        SecondDerivativeError: the loss cannot be differentiated twice.
        ValueError: an argument out of range.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64))
    >>> loss = Loss.from_closure(lambda: (weight**3).sum(), [weight])
    >>> hessian_trace(loss)
    Trace(value=0.0, error=0.0, products=3)
    """
    if method not in TRACE_METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, TRACE_METHODS))}, got {method!r}")
    if samples < 2 or (method == "xtrace" and samples % 2):
        rule = "at least 2" + (" and even for xtrace" if method == "xtrace" else "")
        raise ValueError(f"samples must be {rule}, got {samples}")
    loss.check()
    with loss.measuring(), counting(progress, "Hessian trace", min(samples, loss.size)) as tick:
        operator = hessian(loss, tick)
        if samples >= loss.size:
            return Trace(float(_dense(operator).trace()), 0.0, operator.products)
        curvlinops = require("curvlinops", "the trace")
        loss.seed_generators(seed)
        if method == "xtrace":
            return Trace(float(curvlinops.xtrace(operator, samples)), None, operator.products)
        values = [float(curvlinops.hutchinson_trace(operator, 1)) for _ in range(samples)]
        mean = math.fsum(values) / samples
        variance = math.fsum((value - mean) ** 2 for value in values) / (samples - 1)
        return Trace(mean, math.sqrt(variance / samples), operator.products)


def spectral_density(
    loss: Loss,
    *,
    steps: int = 64,
    repeats: int = 1,
    points: int = 1024,
    kappa: float = 3.0,
    seed: int = 0,
    progress: bool = False,
) -> SpectralDensity:
    """Estimate the eigenvalue density of the Hessian, by stochastic Lanczos quadrature (Papyan 2020).

    Each peak becomes a Gaussian, so a feature is at least about ``1 / steps`` of the whole range wide.

    Args:
        loss: see :class:`Loss`.
        steps: steps of Lanczos' method, one Hessian-vector product each; they set the resolution.
        repeats: number of random vectors to average over.
        points: number of grid points.
        kappa: a larger value makes the Gaussians narrower.
        seed: seed of the random vectors.
        progress: show a bar (needs tqdm).

    Raises:
        ImportError: curvlinops or SciPy is not installed.
        RuntimeError, SecondDerivativeError: as :func:`hessian_eigenvalues`.
        ValueError: an argument out of range.

    >>> weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    >>> loss = Loss.from_closure(lambda: (torch.tensor([1.0, 1.0, 4.0]) * weight**2).sum() / 2, [weight])
    >>> found = spectral_density(loss)
    >>> [round(value, 6) for value in found.extremes]
    [1.0, 4.0]
    """
    for name, value, least in (("steps", steps, 2), ("repeats", repeats, 1), ("points", points, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not kappa > 1:
        raise ValueError(f"kappa must be greater than 1, got {kappa}")
    spectrum = require("curvlinops.papyan2020traces.spectrum", "the spectral density")
    loss.check()
    with loss.measuring(), counting(progress, "spectral density") as tick:
        operator = hessian(loss, tick)
        if loss.size <= DENSE:
            found = torch.linalg.eigvalsh(_dense(operator))
            # as if Lanczos' method had found all eigenvalues, each with the same weight
            iterations = [(found, torch.full((1, loss.size), loss.size**-0.5, dtype=found.dtype, device=found.device))]
        else:
            loss.seed_generators(seed)
            iterations = [_quadrature(spectrum, operator, min(steps, loss.size)) for _ in range(repeats)]
        extremes = (
            min(float(values.min()) for values, _ in iterations),
            max(float(values.max()) for values, _ in iterations),
        )
        margin = 0.0 if extremes[0] < extremes[1] else 1e-3 * max(abs(extremes[0]), 1.0)
        bounds = extremes[0] - margin, extremes[1] + margin
        draw = spectrum.lanczos_approximate_spectrum_from_iter
        taken = min(len(values) for values, _ in iterations)
        # room for three standard deviations of the Gaussians, whose width is relative to the range with its margins
        sigma = min(2 / max(taken - 1, 1) / math.sqrt(8 * math.log(kappa)), 0.3)
        drawn = [draw(one, bounds, points, kappa, max(0.05, 1.5 * sigma / (1 - 3 * sigma))) for one in iterations]
        density = torch.stack([values for _, values in drawn]).mean(0)
        return SpectralDensity(tuple(drawn[0][0].tolist()), tuple(density.tolist()), extremes, taken, operator.products)


def _quadrature(spectrum: Any, operator: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Run Lanczos' method, with fewer steps if the Hessian has fewer distinct eigenvalues."""
    while steps >= 2:
        values, vectors = spectrum.fast_lanczos(operator, steps)
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values, vectors
        steps //= 2
    raise RuntimeError("Lanczos' method found no two different eigenvalues: is the loss linear in the parameters?")


def _dense(operator: Any) -> Tensor:
    """Return the whole matrix."""
    identity = torch.eye(operator.shape[0], dtype=operator.dtype, device=operator.device)
    matrix = torch.stack([operator @ column for column in identity])
    return (matrix + matrix.T) / 2


def _lanczos(
    loss: Loss, operator: Any, k: int, which: str, tolerance: float, max_iterations: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Run ARPACK on the shifted Hessian: its tolerance is relative to each eigenvalue, so it misses those near 0.

    From one start a multiple eigenvalue is found once, except for rounding, and a lesser one in its place. So another
    search looks in the complement of the eigenvectors, until it finds none that belongs among them.
    """
    linalg = require("scipy.sparse.linalg", "eigenvalues of the Hessian")
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return flat(random(loss.params, generator)).to(operator.dtype)

    start = drawn()
    # about the root mean square of the eigenvalues; none of the largest is 3 times as far below 0, nor vice versa
    size = float(torch.linalg.vector_norm(operator @ start) / torch.linalg.vector_norm(start))
    if size == 0.0:  # the loss is linear in the parameters
        return start.new_zeros(k), torch.eye(loss.size, k, dtype=start.dtype, device=start.device)
    shift = {"LA": 3.0, "SA": -3.0, "LM": 0.0}[which] * size
    plain = operator.to_scipy()

    def search(count: int, start: Any, known: Any = ()) -> tuple[Any, Any]:
        """Return eigenvalues of the shifted Hessian and their vectors, orthogonal to the ``known`` ones."""

        def matvec(v: Any) -> Any:
            v = _apart(v.reshape(-1), known)
            return _apart(plain @ v + shift * v, known)

        shifted = linalg.LinearOperator(plain.shape, dtype=plain.dtype, matvec=matvec)
        try:
            values, vectors = linalg.eigsh(
                shifted,
                k=count,
                which=which,
                v0=start,
                tol=tolerance if which == "LM" else tolerance / 4,  # relative to the shifted eigenvalue
                ncv=min(loss.size, max(2 * count + 1, 12)),  # SciPy's 20 for k = 1 costs more products than it saves
                maxiter=max_iterations,
            )
        except linalg.ArpackNoConvergence as error:
            raise RuntimeError(
                f"ARPACK found {len(error.eigenvalues)} of {count} eigenvalues after {operator.products} products: "
                f"raise tolerance (now {tolerance}) or max_iterations"
            ) from error
        return values.copy(), vectors.T.copy()

    values, vectors = search(k, start.cpu().numpy())
    ranks: dict[str, Callable[[Any], Any]] = {"LA": float, "SA": operators.neg, "LM": abs}
    rank = ranks[which]
    while k > 1:
        other = _apart(drawn().cpu().numpy(), vectors)
        if which == "LM" and norm([torch.as_tensor(_apart(plain @ other, vectors))]) < 1e-6 * size * norm([start]):
            break  # all that is left is 0, which ARPACK refuses
        (value,), (vector,) = search(1, other, vectors)
        least = min(range(k), key=lambda i: rank(values[i]))
        if rank(value) <= rank(values[least]) + tolerance * max(abs(values[least] - shift), size):
            break
        values[least], vectors[least] = value, vector
    options = {"dtype": operator.dtype, "device": operator.device}
    return torch.as_tensor(values - shift, **options), torch.as_tensor(vectors.T.copy(), **options)


def _apart(vector: Any, known: Any) -> Any:
    """Return the part of a NumPy vector that is orthogonal to the known unit vectors."""
    for one in known:
        vector = vector - one * (one @ vector)
    return vector
