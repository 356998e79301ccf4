"""Taking over gradients: their storage becomes the engine's where nobody else has a hold on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

RECYCLE_BYTES = 1 << 16
"""From this size on, the memory of the step before's last gradient serves as backup (see :meth:`Walk.begin`)."""

References: TypeAlias = "tuple[int, int, int, int, bool]"


def take(param: Tensor) -> Tensor:
    """Take ``param.grad`` away, for the engine to keep and to overwrite; ``param.grad`` is then ``None``.

    It is copied when somebody else could see it change: another Python or C++ reference to the tensor, a view of its
    storage (the buckets of DistributedDataParallel with ``gradient_as_bucket_view=True`` are such views).

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.sum().backward()
    >>> address = weight.grad.data_ptr()
    >>> take(weight).data_ptr() == address, weight.grad
    (True, None)
    """
    grad = param.grad
    assert grad is not None
    param.grad = None
    return grad if _references(grad) == _sole() else grad.clone(memory_format=torch.preserve_format)


def take_sole(param: Tensor) -> Tensor | None:
    """Take ``param.grad`` away if nobody else could see it change; else leave it."""
    grad = param.grad
    assert grad is not None
    param.grad = None
    if _references(grad) == _sole():
        return grad
    param.grad = grad
    return None


def _references(grad: Tensor) -> References:
    """References to the tensor and to its storage, from Python and from C++, and whether it is all of its storage."""
    storage = grad.untyped_storage()
    whole = storage.nbytes() == grad.numel() * grad.element_size()
    # memory of NumPy or of another process has owners that torch does not count
    whole = whole and storage.resizable() and not storage.is_shared()
    use_count: Callable[[], int] = grad._use_count  # type: ignore[attr-defined]  # not in torch's stubs
    of_storage = sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)
    return sys.getrefcount(grad), use_count(), *of_storage, whole


@cache
def _sole() -> References | None:
    """What :func:`_references` says of a gradient that only :func:`take` holds; ``None`` if this torch cannot tell."""
    if not (hasattr(Tensor, "_use_count") and hasattr(torch._C, "_storage_Use_Count")):
        return None
    with torch.inference_mode(False), torch.enable_grad():
        param = torch.ones(1, requires_grad=True)
        param.sum().backward()
    return _measure(param)


def _measure(param: Tensor) -> References:
    grad = param.grad
    assert grad is not None
    param.grad = None
    return _references(grad)


def as_dtype(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in the parameter's dtype: itself, where it has that."""
    return grad if grad.dtype == dtype else grad.to(dtype)


def is_alike(a: Tensor, b: Tensor) -> bool:
    """Whether one can take the other's place in memory."""
    return a.dtype == b.dtype and a.device == b.device and a.shape == b.shape and a.stride() == b.stride()


def is_large_on_cpu(param: Tensor) -> bool:
    """Whether memory for it had better be recycled."""
    return param.device.type == "cpu" and param.numel() * param.element_size() >= RECYCLE_BYTES
