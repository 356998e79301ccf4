"""Evaluate the loss and its gradient norm along directions through θ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .extra import counting
from .loss import Loss
from .vectors import Vector, checked, norm, plus, random, scaled


@dataclass(frozen=True)
class Slice:
    """L(θ + t d) and ‖∇L(θ + t d)‖ along one direction d, for each offset t."""

    offsets: tuple[float, ...]
    loss: tuple[float, ...]
    gradient_norm: tuple[float, ...]


@dataclass(frozen=True)
class Surface:
    """Loss and gradient norm over a plane; entry [i][j] is at offset i of the first direction and j of the second."""

    offsets: tuple[tuple[float, ...], tuple[float, ...]]
    loss: tuple[tuple[float, ...], ...]
    gradient_norm: tuple[tuple[float, ...], ...]


def filter_normalised_direction(loss: Loss, seed: int = 0) -> Vector:
    """Return a random direction whose filters (or matrix rows) are as long as those of the weights; 0 for vectors.

    This makes slices of networks with differently scaled weights comparable. Source: Li et al., Visualizing the Loss
    Landscape of Neural Nets, NeurIPS 2018, arXiv 1712.09913.

    Args:
        loss: the loss whose parameters set the scale.
        seed: seed of the random numbers, which are the same on every device.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> direction = filter_normalised_direction(Loss.from_closure(lambda: weight.sum(), [weight]))
    >>> direction[0].norm(dim=1)
    tensor([5., 1.])
    """
    found = []
    for param, d in zip(loss.params, random(loss.params, torch.Generator().manual_seed(seed)), strict=True):
        if param.dim() > 1:
            size = param.detach().to(d.dtype).flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1)
            found.append(d * size.view(-1, *[1] * (param.dim() - 1)))
        else:
            found.append(torch.zeros_like(d))
    return found


def slice_1d(
    loss: Loss, direction: Sequence[Tensor], offsets: Sequence[float] | None = None, *, progress: bool = False
) -> Slice:
    """Evaluate L(θ + t d) and ‖∇L(θ + t d)‖ for each t in ``offsets`` (default: 31 from −1 to 1).

    Args:
        loss: see :class:`Loss`.
        direction: d, one tensor per parameter.
        offsets: values of t.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: the direction's shapes are not those of the parameters.

    >>> weight = torch.nn.Parameter(torch.zeros(1))
    >>> slice_1d(Loss.from_closure(lambda: weight.square().sum(), [weight]), [torch.ones(1)], [-1.0, 0.0, 2.0])
    Slice(offsets=(-1.0, 0.0, 2.0), loss=(1.0, 0.0, 4.0), gradient_norm=(2.0, 0.0, 4.0))
    """
    d = checked(direction, loss.params, "a direction")
    ts = tuple(map(float, [(i - 15) / 15 for i in range(31)] if offsets is None else offsets))
    loss.check()
    with loss.measuring() as theta, counting(progress, "slice", len(ts)) as tick:
        found = [_at(loss, theta, scaled(d, t), tick) for t in ts]
    return Slice(ts, tuple(value for value, _ in found), tuple(size for _, size in found))


def slice_2d(
    loss: Loss,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    offsets: tuple[Sequence[float], Sequence[float]] | None = None,
    *,
    progress: bool = False,
) -> Surface:
    """Evaluate like :func:`slice_1d` over the plane of two directions (default: 15 offsets from −1 to 1 along each).

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> loss = Loss.from_closure(lambda: weight.square().sum(), [weight])
    >>> slice_2d(loss, [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])], ([0.0, 1.0], [0.0, 2.0])).loss
    ((0.0, 4.0), (1.0, 5.0))
    """
    a, b = (checked(d, loss.params, "a direction") for d in (first, second))
    line = [(i - 7) / 7 for i in range(15)]
    rows, columns = (tuple(map(float, ts)) for ts in ((line, line) if offsets is None else offsets))
    loss.check()
    with loss.measuring() as theta, counting(progress, "surface", len(rows) * len(columns)) as tick:
        found = [[_at(loss, theta, plus(scaled(a, s), b, t), tick) for t in columns] for s in rows]
    values = tuple(tuple(value for value, _ in row) for row in found)
    return Surface((rows, columns), values, tuple(tuple(size for _, size in row) for row in found))


def _at(loss: Loss, theta: Vector, delta: Vector, tick: Callable[[], None]) -> tuple[float, float]:
    loss.move(theta, delta)
    value, grads = loss.gradient()

    tick()
    return value, norm(grads)
