"""Add up the sums of a step over devices, and check them for finiteness in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from .backends.base import Products, Scalar, accumulate_dtype


def add_up(values: Sequence[Tensor]) -> Tensor:
    """Sum over devices in their order, on the first of them.

    >>> import torch
    >>> float(add_up([torch.tensor(9.0), torch.tensor(16.0)]))
    25.0
    """
    total = values[0]
    for value in values[1:]:
        total = total + value.to(total.device, accumulate_dtype(total.device))
    return total


def is_finite(values: Sequence[Scalar | Products]) -> bool:
    """Return whether all values are finite. On an accelerator this copies each, without a kernel, and waits.

    >>> is_finite([1.0, [[2.0, 3.0, 4.0]]]), is_finite([float("inf")])
    (True, False)
    """
    for value in values:
        found = value.tolist() if isinstance(value, Tensor) else value
        if not (all(map(math.isfinite, chain(*found))) if isinstance(found, list) else math.isfinite(found)):
            return False
    return True


def reads_are_free(device: torch.device) -> bool:
    """Return whether tensors on ``device`` are read without waiting; norms and products then become numbers."""
    return device.type == "cpu"


def on(value: Scalar, device: torch.device) -> Scalar:
    """Return the scalar, or one per group, for a backend on ``device``: a single one is a number on a CPU."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    return float(value) if reads_are_free(device) and value.numel() == 1 else value


def products_on(products: Tensor, device: torch.device) -> Products:
    """Return the products for a backend on ``device``: numbers on a CPU."""
    products = products.to(device)
    return products.tolist() if reads_are_free(device) else products
