"""Scalars computed from the sums: 1/‖v‖, κ, the clipping factor, and the factors of a direction.

Sums are Python numbers if all parameters are on a CPU, where reading a tensor does not wait. With an accelerator they
are tensors, so that nothing waits. Each function accepts both. Kernels that take the sums themselves compute the same
formulas from ``csrc/math.h``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Direction, PerGroup, Products, Scalar

XI = 1e-12
"""ξ of the formulas: added to a norm before dividing by it."""

CLIP_EPSILON = 1e-6
"""Added to the norm when clipping, as :func:`torch.nn.utils.clip_grad_norm_` does."""


def root(square: Scalar) -> Scalar:
    """Return the square root; 0 for a number that rounding has made negative.

    >>> root(9.0), root(-1e-20)
    (3.0, 0.0)
    """
    return square.clamp_min(0.0).sqrt() if isinstance(square, Tensor) else math.sqrt(0.0 if square < 0.0 else square)


def inverse_norm(square: Scalar) -> Scalar:
    """Return ``1 / (‖v‖ + ξ)``.

    >>> inverse_norm(4.0)
    0.49999999999975
    """
    return 1.0 / (root(square) + XI)


def ratio(numerator: Scalar, square: Scalar) -> Scalar:
    """Return ``numerator / square``, or 0 if the square is 0 or NaN.

    >>> ratio(1.0, 4.0), ratio(1.0, 0.0)
    (0.25, 0.0)
    """
    if isinstance(square, Tensor):
        return torch.where(square > 0, numerator / square, torch.zeros_like(square))
    return numerator / square if square > 0 else 0.0


def length_ratio(square: Scalar, other: Scalar) -> Scalar:
    """Return ``‖v‖ / ‖w‖`` from their squares, or 0 if w is 0.

    >>> length_ratio(9.0, 4.0), length_ratio(9.0, 0.0)
    (1.5, 0.0)
    """
    return root(ratio(square, other))


def given(kappa: Any, square: Any, groups: int) -> Products:
    """Return products that give a direction this κ, and this ‖d‖² for clipping if all γ are 0.

    >>> given(0.5, 4.0, groups=2)
    [[4.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    """
    if isinstance(kappa, Tensor):
        # without assignments: rows[0, 0] = 1.0 copies from the host, and waits
        row = torch.stack([torch.ones_like(kappa) * square, kappa * square, torch.zeros_like(kappa)])
        return torch.nn.functional.pad(row.unsqueeze(0), (0, 0, 0, groups - 1))
    return [[square, kappa * square, 0.0], *([0.0] * 3 for _ in range(groups - 1))]


def columns(products: Products) -> list[Sequence[Scalar]]:
    """Return ‖u‖², ⟨m,u⟩ and ‖m‖² by group.

    >>> columns([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    [(1.0, 4.0), (2.0, 5.0), (3.0, 6.0)]
    """
    if isinstance(products, Tensor):
        return [column.unbind() for column in products.unbind(1)]
    return list(zip(*products, strict=True))


def clip_factor(square: Scalar, limit: float) -> Scalar:
    """Return ``min(1, limit / (‖d‖ + 1e-6))``.

    >>> clip_factor(4.0, 3.0), clip_factor(36.0, 3.0)
    (1.0, 0.4999999166666...)
    """
    factor = limit / (root(square) + CLIP_EPSILON)
    return factor.clamp_max(1.0) if isinstance(factor, Tensor) else 1.0 if factor > 1.0 else factor


def factors(d: Direction) -> list[Sequence[Scalar]]:
    """Return ``s (p + κ q)`` of each term, by group.

    s clips the direction d = a u − γ m, where a = 1 + γ κ (d = u without ``q``):
    ``‖d‖² = Σ_groups a² ‖u‖² − 2 a γ ⟨m,u⟩ + γ² ‖m‖²``, by the γ of each group.

    >>> projected = Direction([], [[1.0], [2.0]], [[0.5], [0.0]], products=[[4.0, 2.0, 1.0]], gamma=[0.1])
    >>> factors(projected)
    [[1.25], [2.0]]
    """
    rows: list[Sequence[Scalar]] = list(d.p)
    if d.q is None and d.limit is None:
        return rows
    assert d.products is not None
    kappa: Scalar = 0.0
    uu, um, mm = columns(d.products)
    if d.q is not None:
        kappa = ratio(sum(um), sum(uu))
        rows = [[kappa * y + x for x, y in zip(ps, qs, strict=True)] for ps, qs in zip(d.p, d.q, strict=True)]
    if d.limit is not None:
        square = sum(uu)
        if d.q is not None:
            square = 0.0
            for of_uu, of_um, of_mm, gamma in zip(uu, um, mm, d.gamma, strict=True):
                a = 1.0 + gamma * kappa
                square += a * a * of_uu - 2.0 * a * gamma * of_um + gamma * gamma * of_mm
        scale = clip_factor(square, d.limit)
        rows = [[scale * x for x in row] for row in rows]
    return rows


def steps(radius: PerGroup, square: Scalar, multiple: PerGroup | None = None) -> list[Scalar]:
    """Return ``radius / (‖v‖ + ξ) + multiple`` by group, from ‖v‖², which may be one number per group.

    >>> steps([1.0, 2.0], 4.0), steps([1.0], 4.0, [0.5])
    ([0.49999999999975, 0.9999999999995], [0.99999999999975])
    """
    n = len(radius)
    scale = inverse_norm(square)
    scales: Any = [scale] * n
    if isinstance(scale, Tensor) and scale.dim():
        scales = scale[:n] if scale.numel() > 1 else scale.expand(n)
    return [s * r + m for s, r, m in zip(scales, radius, multiple or [0.0] * n, strict=True)]


def bounded(square: Scalar, radius: PerGroup, offset: PerGroup, cap: PerGroup, weight: float) -> Tensor:
    r"""Return ‖v‖² by group for which ``radius / ‖v‖`` is ``min(|radius| / (‖v‖ + offset), cap)``, with its sign.

    Args:
        square: ‖v‖², one or one per group.
        radius: the radius by group, with a sign.
        offset: the offset by group.
        cap: the cap by group.
        weight: the factor of v when it covers only a part of the micro-batches.

    >>> bounded(4.0, [1.0, 1.0], [0.5, 0.0], [9.0, 0.25], 1.0)     # 1/2.5, and 0.25
    tensor([ 6.2500, 16.0000], dtype=torch.float64)
    """
    found = root(square)
    length = found if isinstance(found, Tensor) else torch.tensor(found, dtype=torch.float64)
    lengths = length if length.numel() > 1 else length.expand(len(radius))
    least = [abs(r) / (c * weight) if c * weight else math.inf if r else 0.0 for r, c in zip(radius, cap, strict=True)]
    rows = zip(lengths, offset, least, strict=True)
    return torch.stack([(n + o / weight).clamp_min(floor) for n, o, floor in rows]).square()


def on_device(value: Scalar | Products, device: torch.device) -> Tensor:
    """Return sums, given as numbers or tensors, as a contiguous float64 tensor on ``device`` for kernels.

    >>> on_device(2.0, torch.device("cpu"))
    tensor(2., dtype=torch.float64)
    """
    if isinstance(value, Tensor) and value.dtype == torch.float64 and value.device == device:
        return value.contiguous()
    if isinstance(value, float):  # a copy from the host would wait
        return torch.full((), value, dtype=torch.float64, device=device)
    return torch.as_tensor(value, dtype=torch.float64, device=device)
