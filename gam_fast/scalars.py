"""The few numbers of a step: norms, κ and the clipping factor, from the sums of the backends.

They are plain floats when all parameters are on a CPU, where reading a tensor waits for nothing; with an accelerator
they stay 0-dim tensors, so that nothing waits for it. Each function does the same with both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .backends.base import Scalar, accumulate_dtype

Products: TypeAlias = "list[list[float]] | Tensor"
"""``(groups, 3)``: ‖u‖², ⟨m,u⟩ and ‖m‖² by parameter group."""

XI = 1e-12
"""ξ of the formulas: added to a norm before dividing by it."""

CLIP_EPSILON = 1e-6
"""Added to the norm when clipping, as :func:`torch.nn.utils.clip_grad_norm_` does."""


def add_up(values: Sequence[Tensor]) -> Tensor:
    """Sum over devices, on the first of them, in their order."""
    total = values[0]
    for value in values[1:]:
        total = total + value.to(total.device, accumulate_dtype(total.device))
    return total


def square_norm(values: Sequence[Tensor], on_host: bool) -> Scalar:
    """The sum of 0-dim tensors, one a device.

    >>> square_norm([torch.tensor(9.0), torch.tensor(16.0)], on_host=True)
    25.0
    """
    total = add_up(values)
    return float(total) if on_host else total


def inner_products(values: Sequence[Tensor], on_host: bool) -> Products:
    """The sum of tables of products, one a device."""
    total = add_up(values)
    return total.tolist() if on_host else total


def over_groups(products: Products) -> tuple[Scalar, Scalar, Scalar]:
    """‖u‖², ⟨m,u⟩ and ‖m‖² of all groups.

    >>> over_groups([[1.0, 2.0, 3.0], [1.0, 0.0, 1.0]])
    (2.0, 2.0, 4.0)
    """
    if isinstance(products, Tensor):
        uu, um, mm = products.sum(0)
        return uu, um, mm
    return sum(row[0] for row in products), sum(row[1] for row in products), sum(row[2] for row in products)


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


def is_finite(values: Sequence[Scalar]) -> bool:
    """Whether all are finite; waits for an accelerator.

    >>> is_finite([1.0, 2.0]), is_finite([float("inf")])
    (True, False)
    """
    tensors = [value for value in values if isinstance(value, Tensor)]
    finite = all(math.isfinite(value) for value in values if not isinstance(value, Tensor))
    return finite and (not tensors or bool(torch.isfinite(torch.stack(tensors)).all()))


def clip_factor(products: Products, gamma: Sequence[float], kappa: Scalar | None, limit: float) -> Scalar:
    """``min(1, limit / ‖d‖)`` of the direction d = a u − γ m with a = 1 + γ κ, and d = u without ``kappa``.

    ``‖d‖² = Σ_groups a² ‖u‖² − 2 a γ ⟨m,u⟩ + γ² ‖m‖²``, by the γ of each group.

    >>> clip_factor([[4.0, 0.0, 0.0]], [0.0], None, 3.0)
    1.0
    """
    if isinstance(products, Tensor):
        return _clip_factor_on_device(products, gamma, kappa, limit)
    on_host = 0.0 if kappa is None else float(kappa)
    total = 0.0
    for (uu, um, mm), g in zip(products, gamma if kappa is not None else [0.0] * len(gamma), strict=True):
        a = 1.0 + g * on_host
        total += a * a * uu - 2.0 * a * g * um + g * g * mm
    factor = limit / (math.sqrt(max(total, 0.0)) + CLIP_EPSILON)
    return 1.0 if factor > 1.0 else factor


def _clip_factor_on_device(products: Tensor, gamma: Sequence[float], kappa: Scalar | None, limit: float) -> Tensor:
    uu, um, mm = products.unbind(1)
    if kappa is None:
        square = uu.sum()
    else:
        same = all(g == gamma[0] for g in gamma)
        g = gamma[0] if same else torch.tensor(gamma, dtype=products.dtype, device=products.device)
        a = 1.0 + g * kappa
        square = (a * a * uu - 2.0 * a * g * um + g * g * mm).sum().clamp_min(0.0)
    return (limit / (square.sqrt() + CLIP_EPSILON)).clamp_max(1.0)
