"""Vectors of the parameters' shape, as lists of tensors; fp32 for parameters in half precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Vector: TypeAlias = "list[Tensor]"


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of vectors for parameters of ``dtype``: fp32 for half precision.

    >>> wide(torch.bfloat16), wide(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype.itemsize == 2 else dtype


def checked(given: Sequence[Tensor], params: Sequence[Tensor], name: str) -> Vector:
    """Return ``given`` as a vector of the parameters' shapes, on their devices.

    Raises:
        ValueError: its shapes are not those of the parameters.

    >>> checked([torch.ones(2)], [torch.zeros(3)], "a start")
    Traceback (most recent call last):
    ValueError: a start must have one tensor per parameter, of its shape, got [(2,)]
    """
    if [x.shape for x in given] != [p.shape for p in params]:
        shapes = [tuple(x.shape) for x in given]
        raise ValueError(f"{name} must have one tensor per parameter, of its shape, got {shapes}")
    return [x.detach().to(p.device, wide(p.dtype)) for x, p in zip(given, params, strict=True)]


def norm(a: Vector) -> float:
    """Return ‖a‖.

    >>> norm([torch.tensor([3.0]), torch.tensor([4.0])])
    5.0
    """
    return math.hypot(*(float(torch.linalg.vector_norm(x)) for x in a))


def scaled(a: Vector, factor: float) -> Vector:
    """Return factor · a."""
    return list(torch._foreach_mul(a, factor))


def plus(a: Vector, b: Vector, factor: float) -> Vector:
    """Return a + factor · b."""
    return list(torch._foreach_add(a, b, alpha=factor))


def random(like: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """Draw normal entries from a generator on the CPU, so that they are the same on every device."""
    return [torch.randn(x.shape, generator=generator, dtype=wide(x.dtype)).to(x.device) for x in like]


def flat(a: Vector) -> Tensor:
    """Concatenate to one tensor on the device of the first."""
    return torch.cat([x.flatten().to(a[0].device, a[0].dtype) for x in a])


def split(a: Tensor, like: Iterable[Tensor]) -> Vector:
    """Invert :func:`flat`.

    >>> split(torch.arange(3.0), [torch.zeros(1, 2), torch.zeros(1)])
    [tensor([[0., 1.]]), tensor([2.])]
    """
    like = list(like)
    parts = a.split([x.numel() for x in like])
    return [part.view(x.shape).to(x.device, wide(x.dtype)) for part, x in zip(parts, like, strict=True)]
