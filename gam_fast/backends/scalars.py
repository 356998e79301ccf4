"""The few numbers between the sums and what uses them: 1/‖v‖, κ, the clipping factor, the factors of a direction.

Sums are plain numbers where all parameters are on a CPU, where reading a tensor waits for nothing; with an accelerator
they are tensors, so that nothing waits for it. Each function does the same with both. Kernels of a device that take the
sums themselves compute the same by ``csrc/math.h``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Direction, PerGroup, Products, Scalar

XI = 1e-12
"""ξ of the formulas: added to a norm before dividing by it."""

CLIP_EPSILON = 1e-6
"""Added to the norm when clipping, as :func:`torch.nn.utils.clip_grad_norm_` does."""


def over_groups(products: Products) -> tuple[Scalar, Scalar, Scalar]:
    """‖u‖², ⟨m,u⟩ and ‖m‖² of all groups.

    >>> over_groups([[1.0, 2.0, 3.0], [1.0, 0.0, 1.0]])
    (2.0, 2.0, 4.0)
    """
    if isinstance(products, Tensor):
        uu, um, mm = products.sum(0)
        return uu, um, mm
    uu, um, mm = (sum(column) for column in zip(*products, strict=True))
    return uu, um, mm


def inverse_norm(square: Scalar) -> Scalar:
    """``1 / (‖v‖ + ξ)``.

    >>> inverse_norm(4.0)
    0.49999999999975
    """
    return 1.0 / ((square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)) + XI)


def ratio(numerator: Scalar, square: Scalar) -> Scalar:
    """``numerator / square``, and 0 where the square is 0 (or not a number).

    >>> ratio(1.0, 4.0), ratio(1.0, 0.0)
    (0.25, 0.0)
    """
    if isinstance(square, Tensor):
        return torch.where(square > 0, numerator / square, torch.zeros_like(square))
    return numerator / square if square > 0 else 0.0


def clip_factor(products: Products, gamma: PerGroup, kappa: Scalar | None, limit: float) -> Scalar:
    """``min(1, limit / ‖d‖)`` of the direction d = a u − γ m with a = 1 + γ κ, and d = u without ``kappa``.

    ``‖d‖² = Σ_groups a² ‖u‖² − 2 a γ ⟨m,u⟩ + γ² ‖m‖²``, by the γ of each group.

    >>> clip_factor([[4.0, 0.0, 0.0]], [0.0], None, 3.0)
    1.0
    """
    if isinstance(products, Tensor) or isinstance(kappa, Tensor):
        assert isinstance(products, Tensor)
        return _clip_factor_on_device(products, gamma, kappa, limit)
    total = 0.0
    for (uu, um, mm), g in zip(products, gamma, strict=True):
        if kappa is not None:
            a = 1.0 + g * kappa
            total += a * a * uu - 2.0 * a * g * um + g * g * mm
        else:
            total += uu
    factor = limit / (math.sqrt(max(total, 0.0)) + CLIP_EPSILON)
    return 1.0 if factor > 1.0 else factor


def _clip_factor_on_device(products: Tensor, gamma: PerGroup, kappa: Scalar | None, limit: float) -> Tensor:
    uu, um, mm = products.unbind(1)
    if kappa is None:
        square = uu.sum()
    else:
        same = all(g == gamma[0] for g in gamma)
        # filled by the device: a copy of the list would wait for it
        g = gamma[0] if same else torch.stack([products.new_full((), g) for g in gamma])
        a = 1.0 + g * kappa
        square = (a * a * uu - 2.0 * a * g * um + g * g * mm).sum().clamp_min(0.0)
    return (limit / (square.sqrt() + CLIP_EPSILON)).clamp_max(1.0)


def factors(d: Direction) -> list[Sequence[Scalar]]:
    """``s (p + κ q)`` of each term, by group.

    >>> projected = Direction([], [[1.0], [2.0]], [[0.5], [0.0]], products=[[4.0, 2.0, 1.0]], gamma=[0.1])
    >>> factors(projected)
    [[1.25], [2.0]]
    """
    rows: list[Sequence[Scalar]] = list(d.p)
    kappa: Scalar | None = None
    if d.q is not None:
        assert d.products is not None
        uu, um, _ = over_groups(d.products)
        kappa = ratio(um, uu)
        rows = [[kappa * y + x for x, y in zip(ps, qs, strict=True)] for ps, qs in zip(d.p, d.q, strict=True)]
    if d.limit is not None:
        assert d.products is not None
        scale = clip_factor(d.products, d.gamma, kappa, d.limit)
        rows = [[scale * x for x in row] for row in rows]
    return rows


def steps(radius: PerGroup, square: Scalar) -> list[Scalar]:
    """``radius / (‖v‖ + ξ)`` by group, from ‖v‖².

    >>> steps([1.0, 2.0], 4.0)
    [0.49999999999975, 0.9999999999995]
    """
    scale = inverse_norm(square)
    return [scale * r for r in radius]


def on_device(value: Scalar | Products, device: torch.device) -> Tensor:
    """Sums as kernels read them where they lie: a contiguous tensor of float64, whatever they were handed over as.

    >>> on_device(2.0, torch.device("cpu"))
    tensor(2., dtype=torch.float64)
    """
    if isinstance(value, Tensor) and value.dtype == torch.float64 and value.device == device:
        return value.contiguous()
    return torch.as_tensor(value, dtype=torch.float64, device=device)
