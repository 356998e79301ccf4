r"""Zeroth- and first-order flatness: maxima over a ball around θ, found by ascent.

.. math::
    R^0_ρ(θ) = \max_{‖δ‖ ≤ ρ} L(θ + δ) − L(θ), \qquad
    R^1_ρ(θ) = ρ \max_{‖δ‖ ≤ ρ} ‖∇L(θ + δ)‖, \qquad R^0_ρ ≤ R^1_ρ .

At a minimum of a quadratic, :math:`R^0 = ρ^2 λ_{\max}/2` and :math:`R^1 = ρ^2 λ_{\max}`. In general an ascent reaches a
lower bound of the maximum. The largest bound of several starts is reported, with data to judge it. Source: Zhang et
al., CVPR 2023, arXiv 2303.03108.

The method is projected gradient ascent with Nesterov's momentum, restarted whenever the value falls. It starts with a
very long step, which leads to the point of the ball that lies farthest along the gradient. On a quadratic this is one
step of the power method, and momentum makes it about as fast as Lanczos' method. If a plain step fails, the step
length is reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from .extra import counting
from .loss import Loss
from .vectors import Vector, checked, norm, plus, random, scaled

Evaluate: TypeAlias = "Callable[[Vector | None], tuple[float, Vector]]"
"""Maps a displacement δ (``None``: 0) to the value there and its gradient."""

LONGEST, SHORTEST = 1e4, 1e-6
"""Lengths of a step before projection, in radii, at the steepest slope so far. The longest is practically infinite."""


HALVINGS = 20
"""How often a start with a non-finite value is moved to half its distance from θ."""


@dataclass(frozen=True)
class Flatness:
    """Result of the ascents in the ball.

    Attributes:
        value: the bound reached, R0 or R1, in units of the loss.
        rho: ρ, the radius of the ball.
        loss: L(θ).
        converged: whether the ascent that reached ``value`` ended with a ``residual`` below the tolerance.
        residual: 0 at a stationary point. On the sphere: the distance, in radii, to the projection of a gradient step
            of length ρ. Inside: the first-order gain of a step of length ρ, relative to the gain so far. At the minimum
            of a quadratic, the relative error of ``value`` is about the residual's square over the relative gap of the
            two largest eigenvalues; elsewhere no such law holds.
        iterations: iterations of the ascent that reached ``value``.
        evaluations: evaluations of value and gradient, in all ascents.
        starts: the bound that each start reached, given starts first. If they differ, there are several local maxima.
        point: δ of the maximum, one tensor per parameter.
    """

    value: float
    rho: float
    loss: float
    converged: bool
    residual: float
    iterations: int
    evaluations: int
    starts: tuple[float, ...]
    point: tuple[Tensor, ...] = field(repr=False, compare=False)


@dataclass(frozen=True)
class _Ball:
    """The ball, and when an ascent in it ends."""

    rho: float
    max_iterations: int
    tolerance: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise ValueError(f"rho must be a number that is not negative, got {self.rho!r}")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance!r}")

    def project(self, delta: Vector) -> Vector:
        """Return the point of the ball nearest to ``delta``."""
        size = norm(delta)
        return delta if size <= self.rho else scaled(delta, self.rho / size)


@dataclass(frozen=True)
class _Ascent:
    """The end of one ascent."""

    value: float
    point: Vector
    residual: float
    iterations: int


def zeroth_order_flatness(
    loss: Loss,
    rho: float,
    *,
    restarts: int = 3,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    starts: Sequence[Sequence[Tensor]] = (),
    progress: bool = False,
) -> Flatness:
    r"""Bound :math:`R^0_ρ(θ) = \max_{‖δ‖ ≤ ρ} L(θ + δ) − L(θ)`, which SAM minimises, from below by ascent.

    The norm is over all parameters of ``loss``. Each evaluation is one gradient over the whole data set. A rise of the
    loss below its rounding error cannot be measured and is never reported as converged. So convert a half-precision
    model to float32 first, and for a small ρ to float64.

    Args:
        loss: see :class:`Loss`.
        rho: ρ, in units of the parameters.
        restarts: number of ascents. The first starts at θ along the gradient (unless that is 0), as SAM does, the
            others at random points of the sphere.
        max_iterations: iterations of each ascent.
        tolerance: an ascent has converged when its residual is below this (see :class:`Flatness`).
        seed: seed of the random directions.
        starts: further displacements δ to start from, each with one tensor per parameter.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: a radius, number or tolerance out of range.

    >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    >>> loss = Loss.from_closure(lambda: (torch.tensor([4.0, 1.0]) * weight**2).sum() / 2, [weight])
    >>> found = zeroth_order_flatness(loss, rho=0.5)           # ρ² λmax / 2
    >>> round(found.value, 6), found.converged
    (0.5, True)
    """
    ball = _Ball(rho, max_iterations, tolerance)
    found, slope = _search(
        loss, ball, loss.gradient, lambda value, at_theta: value - at_theta, restarts, seed, starts, progress
    )
    # a rise below the rounding error of the loss cannot be measured
    known = rho == 0 or slope == 0 or found.value > 8 * loss.resolution * abs(found.loss)
    return found if known else replace(found, converged=False)


def first_order_flatness(
    loss: Loss,
    rho: float,
    *,
    restarts: int = 3,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    starts: Sequence[Sequence[Tensor]] = (),
    progress: bool = False,
) -> Flatness:
    r"""Bound :math:`R^1_ρ(θ) = ρ \max_{‖δ‖ ≤ ρ} ‖∇L(θ + δ)‖`, which GAM minimises, from below by ascent.

    As :func:`zeroth_order_flatness`, with two differences. The first ascent starts along the gradient of the gradient
    norm, as GAM does. Each evaluation is a gradient and a Hessian-vector product over the whole data set.

    Raises:
        SecondDerivativeError: the loss cannot be differentiated twice.
        ValueError: as :func:`zeroth_order_flatness`.

    >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    >>> loss = Loss.from_closure(lambda: (torch.tensor([4.0, 1.0]) * weight**2).sum() / 2, [weight])
    >>> found = first_order_flatness(loss, rho=0.5)           # ρ² λmax
    >>> round(found.value, 6), found.converged
    (1.0, True)
    """
    ball = _Ball(rho, max_iterations, tolerance)
    return _search(loss, ball, loss.norm_gradient, lambda value, _: rho * value, restarts, seed, starts, progress)[0]


def _search(
    loss: Loss,
    ball: _Ball,
    read: Callable[[], tuple[float, Vector]],
    bound: Callable[[float, float], float],
    restarts: int,
    seed: int,
    starts: Sequence[Sequence[Tensor]],
    progress: bool,
) -> tuple[Flatness, float]:
    """Return the largest value in the ball, and the length of its gradient at θ.

    ``read`` evaluates value and gradient at the present parameters. ``bound`` computes the measure from a value and
    L(θ).
    """
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    given = [checked(start, loss.params, "a start") for start in starts]
    loss.check()
    with loss.measuring() as theta, counting(progress, "ascent in the ball") as tick:

        def evaluate(delta: Vector | None) -> tuple[float, Vector]:
            loss.move(theta, delta)
            tick()
            return read()

        at_theta = loss.value()
        at_zero = evaluate(None)
        points = _starting_points(loss, at_zero[1], ball, restarts, seed, given)
        found = _maximise(
            evaluate, at_zero, points, ball, at_theta, lambda value: bound(value, at_theta), loss.resolution
        )
        return found, norm(at_zero[1])


def _starting_points(
    loss: Loss, slope: Vector, ball: _Ball, restarts: int, seed: int, starts: Sequence[Vector]
) -> Iterator[Vector | None]:
    """Yield the given starts, θ itself (``None``) unless its gradient is 0, and random points of the sphere."""
    generator = torch.Generator().manual_seed(seed)
    for start in starts:
        yield ball.project(start)
    if norm(slope) > 0:
        yield None
        restarts -= 1
    for _ in range(restarts):
        direction = random(loss.params, generator)
        yield scaled(direction, ball.rho / norm(direction))


def _maximise(
    evaluate: Evaluate,
    at_zero: tuple[float, Vector],
    points: Iterable[Vector | None],
    ball: _Ball,
    at_theta: float,
    bound: Callable[[float], float],
    resolution: float,
) -> Flatness:
    """Return the best of the ascents from ``points``. ``bound`` computes the measure from a value.

    ``resolution`` is the relative rounding error of a value.
    """
    if not math.isfinite(at_zero[0]):
        raise ValueError(f"the loss or its gradient is not finite at the parameters given: {at_zero[0]}")
    evaluations = 1

    def counted(delta: Vector | None) -> tuple[float, Vector]:
        nonlocal evaluations
        evaluations += 1
        return evaluate(delta)

    best = _Ascent(at_zero[0], scaled(at_zero[1], 0.0), 0.0 if norm(at_zero[1]) == 0 or ball.rho == 0 else math.inf, 0)
    reached = []
    for point in points if ball.rho else ():
        found = _ascend(counted, at_zero, point, ball, resolution)
        reached.append(bound(found.value))
        if found.value > best.value or (found.value == best.value and found.residual < best.residual):
            best = found
    return Flatness(
        value=bound(best.value),
        rho=ball.rho,
        loss=at_theta,
        converged=best.residual <= ball.tolerance,
        residual=best.residual,
        iterations=best.iterations,
        evaluations=evaluations,
        starts=tuple(reached),
        point=tuple(best.point),
    )


def _ascend(
    evaluate: Evaluate, at_zero: tuple[float, Vector], point: Vector | None, ball: _Ball, resolution: float
) -> _Ascent:
    """Ascend from ``point``, or from 0 with the evaluation there. ``last`` and ``here`` are Nesterov's x and y."""
    if point is None:
        point, (value, slope) = scaled(at_zero[1], 0.0), at_zero
    else:
        value, slope = evaluate(point)
    for _ in range(HALVINGS):
        if math.isfinite(value):
            break
        point = scaled(point, 0.5)
        value, slope = evaluate(point)
    if not (math.isfinite(value) and math.isfinite(norm(slope))):
        return _Ascent(-math.inf, point, math.inf, 0)
    here = last = point
    best = _Ascent(value, here, math.inf, 0)
    length, momentum, steepest = LONGEST, 0, norm(slope)
    for iteration in range(ball.max_iterations + 1):
        residual = _residual(here, slope, value - at_zero[0], ball)
        if value >= best.value:
            best = _Ascent(value, here, residual, iteration)
        if residual <= ball.tolerance or iteration == ball.max_iterations:
            break
        steepest = max(steepest, norm(slope))
        ahead = ball.project(plus(here, slope, length * ball.rho / steepest))
        trial = ahead
        if momentum:
            trial = ball.project(plus(ahead, plus(ahead, last, -1.0), momentum / (momentum + 3.0)))
        found, slope_there = evaluate(trial)
        noise = 8 * resolution * abs(value)
        if math.isfinite(found) and math.isfinite(norm(slope_there)) and found >= value - noise:
            last, here, value, slope = ahead, trial, found, slope_there
            momentum += 1
            length = min(LONGEST, 1.3 * length)
        elif momentum:
            momentum = 0
        elif length > SHORTEST:
            length /= 10.0
        else:
            break  # no step leads up: the rest is rounding
    return best


def _residual(here: Vector, slope: Vector, gain: float, ball: _Ball) -> float:
    """Return the residual that :class:`Flatness` defines."""
    size = norm(slope)
    if size == 0.0:
        return 0.0
    if norm(here) >= ball.rho * (1 - 1e-6):
        return norm(plus(ball.project(plus(here, slope, ball.rho / size)), here, -1.0)) / ball.rho
    return size * ball.rho / gain if gain > 0 else math.inf
