"""Taking over gradients: their storage becomes the engine's where nobody else has a hold on it.

The functions on lists are :class:`gam_fast.backends.base.Bookkeeping` for backends that work on plain lists.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Versions:
    """See :class:`gam_fast.backends.base.Versions`."""

    values: list[int]

    def first_changed(self, tensors: list[Tensor]) -> int:
        """The position of the first tensor that was written to since; -1 without one."""
        pairs = zip(self.values, tensors, strict=True)
        return next((i for i, (version, tensor) in enumerate(pairs) if tensor._version != version), -1)


def hold(tensors: list[Tensor]) -> list[Tensor]:
    """The list itself."""
    return tensors


def versions(tensors: list[Tensor]) -> Versions:
    """What autograd counts the changes of tensors by, as it is now.

    >>> x = torch.zeros(2)
    >>> before = versions([x])
    >>> before.first_changed([x]), before.first_changed([x.add_(1.0)])
    (-1, 0)
    """
    return Versions([tensor._version for tensor in tensors])


def devices(tensors: list[Tensor]) -> list[torch.device]:
    """What they are on, each device once."""
    return list(dict.fromkeys(tensor.device for tensor in tensors))


def survey_gradients(params: list[Tensor], flags: bytearray) -> tuple[list[int], bool, int]:
    """The positions of those with a gradient and no flag, whether any has one, and of the first sparse one (or -1)."""
    present = [i for i, param in enumerate(params) if param.grad is not None]
    layouts = ((i, param.grad.layout) for i in present if (param := params[i]).grad is not None)
    sparse = next((i for i, layout in layouts if layout != torch.strided), -1)
    return [i for i in present if not flags[i]], bool(present), sparse


def clear_gradients(params: list[Tensor], recycle: int) -> list[tuple[int, Tensor]]:
    """Take all gradients away; those that can become a backup are handed out with their positions."""
    found = []
    for i, param in enumerate(params):
        if param.grad is not None and param.device.type == "cpu" and param.numel() * param.element_size() >= recycle:
            spare = take_sole(param)
            if spare is not None and is_alike(spare, param):
                found.append((i, spare))
        param.grad = None
    return found


def take_usual_gradients(params: list[Tensor], versions: Any, flags: bytearray, keep: bool) -> list[Tensor] | None:
    """The gradients where all is as usual, which here is no faster to find out."""
    newcomers, _, sparse = survey_gradients(params, bytearray(len(params)))
    usual = len(newcomers) == len(params) and sparse < 0 and len(set(flags)) < 2
    return take_gradients(params, keep) if usual and versions.first_changed(params) < 0 else None


def take_gradients(params: list[Tensor], keep: bool) -> list[Tensor]:
    """The gradients in the dtypes of the parameters, zeros where there is none; with ``keep`` to be overwritten."""
    taken = []
    for param in params:
        if param.grad is None:
            taken.append(torch.zeros_like(param))
        else:
            taken.append(as_dtype(take(param) if keep else param.grad, param.dtype))
    return taken
