"""Add up the sums of a step over devices, and check them for finiteness in one place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

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


def on(value: Any, device: torch.device) -> Any:
    """Return a sum or a table of products for a backend on ``device``: numbers on a CPU, except a vector by group."""
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    return value.tolist() if reads_are_free(device) and value.dim() != 1 else value
