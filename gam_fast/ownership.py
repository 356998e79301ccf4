"""Take over gradients: the engine reuses their storage unless other code holds it.

The functions on lists implement :class:`gam_fast.backends.base.Bookkeeping` for backends that work on plain lists.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .distributed import is_sharded, local, local_gradient

References: TypeAlias = "tuple[int, int, int, int, bool]"
Kind: TypeAlias = "tuple[torch.device, torch.dtype, bool]"


def take(param: Tensor) -> Tensor:
    """Take ``param.grad`` for the engine to keep and overwrite; ``param.grad`` is then ``None``.

    The gradient is copied if other code could see it change: by another Python or C++ reference to the tensor, or by a
    view of its storage (such as the buckets of DistributedDataParallel with ``gradient_as_bucket_view=True``). If it
    may be part of a buffer, it also stays in place until :func:`clear_gradients` finds out. For a DTensor the result is
    a copy of the local part, because in ``fully_shard`` that part is a view of the reduced gradient of a whole module.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> weight.sum().backward()
    >>> address = weight.grad.data_ptr()
    >>> take(weight).data_ptr() == address, weight.grad
    (True, None)
    """
    sole = None if is_sharded(param) else _take_sole(param)
    if sole is not None:
        return sole
    grad = local_gradient(param)
    if param.grad is not grad or not may_be_part(grad):
        param.grad = None
    return grad.clone(memory_format=torch.preserve_format)


def _take_sole(param: Tensor) -> Tensor | None:
    """Take ``param.grad`` if no other code could see it change; otherwise leave it."""
    grad = param.grad
    assert grad is not None
    param.grad = None
    if _references(grad) == _sole():
        return grad
    param.grad = grad
    return None


def _references(grad: Tensor) -> References:
    """Count references to tensor and storage, from Python and C++, and tell whether it fills its storage."""
    storage = grad.untyped_storage()
    whole = storage.nbytes() == grad.numel() * grad.element_size()
    # torch does not count owners in NumPy or in another process
    whole = whole and storage.resizable() and not storage.is_shared()
    use_count: Callable[[], int] = grad._use_count  # type: ignore[attr-defined]  # not in torch's stubs
    of_storage = sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)
    return sys.getrefcount(grad), use_count(), *of_storage, whole


@cache
def _sole() -> References:
    """Return :func:`_references` of a gradient held only by :func:`_take_sole`."""
    with torch.inference_mode(False), torch.enable_grad():
        param = torch.ones(1, requires_grad=True)
        param.sum().backward()
    grad = param.grad
    assert grad is not None
    param.grad = None
    return _references(grad)


def may_be_part(grad: Tensor) -> bool:
    """Return whether ``grad`` may be part of a buffer that other code holds; :func:`parts_of_buffers` decides.

    Autograd makes no gradient that is a view in this sense, but some that share one storage.
    """
    if type(grad) is not Tensor or grad.layout != torch.strided or grad.is_inference():
        return False
    return grad._is_view() or grad.untyped_storage().nbytes() > grad.numel() * grad.element_size()


def has_gradient(param: Tensor) -> bool:
    """Return whether backward was called since :func:`clear_gradients`. For parts, wait for an accelerator."""
    grad = param.grad
    return grad is not None and (not may_be_part(grad) or bool(grad.any()))


def parts_of_buffers(grads: list[Tensor]) -> list[bool]:
    """Return, for gradients that may be parts of buffers, whether each is one.

    It is one if its memory has an owner besides these gradients and tensors of which only these are views.

    >>> buffer = torch.zeros(3)
    >>> parts_of_buffers([buffer[:2], buffer[2:]]), parts_of_buffers([torch.zeros(3)[:2]])
    ([True, True], [False])
    """
    distinct = list({id(grad): grad for grad in grads}.values())
    owners = Counter(grad.untyped_storage()._cdata for grad in distinct)
    views: dict[int, list[Tensor]] = {}  # by their base
    for grad in distinct:
        if grad._is_view():
            views.setdefault(id(grad._base), []).append(grad)
    of_one_view, of_one_owner = _counts()
    for of_base in views.values():
        if _references_to_base(of_base) == of_one_view:
            owners[of_base[0].untyped_storage()._cdata] += 1
    return [_uses(grad) - of_one_owner + 1 > owners[grad.untyped_storage()._cdata] for grad in grads]


def _uses(grad: Tensor) -> int:
    """Count the references to the storage."""
    uses: int = torch._C._storage_Use_Count(grad.untyped_storage()._cdata)
    return uses


def _references_to_base(views: list[Tensor]) -> tuple[int, int]:
    """Count the references to the base of these views, without those of all views but one."""
    base: Any = views[0]._base
    return sys.getrefcount(base), base._use_count() - len(views)


@cache
def _counts() -> tuple[tuple[int, int], int]:
    """Return the results of the two functions above for the base of one view, and for a storage of one owner."""
    with torch.inference_mode(False):
        return _references_to_base([torch.zeros(1, device="cpu").view(1)]), _uses(torch.zeros(1, device="cpu"))


def as_like(grad: Tensor, param: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the gradient in the dtype of its parameter (or ``dtype``) and in its memory order, as the engine needs it.

    This is ``grad`` itself if it fits, or if it is sparse, which the engine refuses.
    """
    dtype = dtype or param.dtype
    if grad.layout is not torch.strided or (grad.dtype == dtype and lies_as(grad, param)):
        return grad
    return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(grad)


def lies_as(tensor: Tensor, param: Tensor) -> bool:
    """Return whether ``tensor`` has the memory order of ``param``, if ``param`` is dense.

    >>> square = torch.zeros(2, 2)
    >>> lies_as(square, square), lies_as(square.T, square), lies_as(torch.zeros(1, 2), torch.zeros(2, 1).T)
    (True, False, True)
    """
    size, strides = param.shape, (tensor.stride(), param.stride())
    if strides[0] == strides[1]:
        return True
    return all(a == b or n == 1 for n, a, b in zip(size, *strides, strict=True)) or not is_dense(size, strides[1])


@lru_cache(maxsize=1 << 14)
def is_dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether the elements fill their memory without gaps or overlaps, in some order of dimensions.

    >>> is_dense((2, 3), (1, 2)), is_dense((2, 3), (4, 1)), is_dense((2, 3), (0, 1))
    (True, False, False)
    """
    if math.prod(size) == 0:
        return True
    expected = 1
    for step, count in sorted((step, count) for step, count in zip(stride, size, strict=True) if count > 1):
        if step != expected:
            return False
        expected *= count
    return True


def kind_of(tensor: Tensor) -> Kind:
    """Return device, dtype, and whether ``tensor`` is dense in memory."""
    return tensor.device, tensor.dtype, is_lazy(tensor) or is_dense(tensor.shape, tensor.stride())


def wider_dtype(param: Tensor) -> torch.dtype | None:
    """Return the dtype of the gradient if it has more bits than the parameter (``Parameter.grad_dtype``), or None.

    >>> wider_dtype(torch.zeros(2, requires_grad=True))
    """
    grad = param.grad
    dtype = getattr(param, "grad_dtype", None) if grad is None else grad.dtype
    is_wider = dtype is not None and dtype.is_floating_point and dtype.itemsize > param.dtype.itemsize
    return dtype if is_wider else None


@dataclass(frozen=True)
class Versions:
    """See :class:`gam_fast.backends.base.Versions`."""

    values: list[int]

    def first_changed(self, tensors: list[Tensor]) -> int:
        """Return the position of the first tensor written to since then, or -1."""
        pairs = zip(self.values, tensors, strict=True)
        return next((i for i, (version, tensor) in enumerate(pairs) if tensor._version != version), -1)


def hold(tensors: list[Tensor], before: list[Tensor] | None = None) -> list[Tensor]:
    """Return the list itself."""
    return tensors


def let_go(tensors: list[Tensor]) -> None:
    """Do nothing: other code may use the same list."""


def versions(tensors: list[Tensor]) -> Versions:
    """Return the current autograd versions of the tensors.

    >>> x = torch.zeros(2)
    >>> before = versions([x])
    >>> before.first_changed([x]), before.first_changed([x.add_(1.0)])
    (-1, 0)
    """
    return Versions([tensor._version for tensor in tensors])


def version(tensor: Tensor) -> int:
    """Return the autograd version of a tensor; 0 for an inference tensor, which has none."""
    return 0 if tensor.is_inference() else tensor._version


def kinds(tensors: list[Tensor]) -> list[Kind]:
    """Return each distinct kind of tensor."""
    return list(dict.fromkeys(map(kind_of, tensors)))


def survey_gradients(params: list[Tensor], flags: bytearray) -> tuple[list[int], bool, int]:
    """Find the gradients: see :meth:`gam_fast.backends.base.Bookkeeping.survey_gradients`."""
    present = {i: param.grad for i, param in enumerate(params) if param.grad is not None}
    sparse = next((i for i, grad in present.items() if grad.layout != torch.strided), -1)
    return [i for i in present if not flags[i]], bool(present), sparse


def clear_gradients(params: list[Tensor], recycle: int, keep_parts: bool = True) -> list[tuple[int, Tensor]]:
    """Remove all gradients. Return, with their positions, those whose memory can serve for the backup.

    With ``keep_parts``, parts of a buffer that other code holds stay and are zeroed.
    """
    found = []
    grads: list[Tensor] = []
    for i, param in enumerate(params):
        grad = param.grad
        if grad is not None and keep_parts and may_be_part(grad):
            grads.append(grad)
            continue
        del grad  # drop this reference
        if param.grad is not None and param.is_cpu and param.nbytes >= recycle:
            spare = _take_sole(param)
            if spare is not None and spare.dtype == param.dtype and spare.stride() == param.stride():
                found.append((i, spare))
        param.grad = None
    parts = {id(grad) for grad, is_part in zip(grads, parts_of_buffers(grads), strict=True) if is_part}
    for param in params if grads else ():
        if id(param.grad) not in parts:
            param.grad = None
        elif param.grad is not None:
            with torch.no_grad():
                param.grad.zero_()
    return found


def take_all_gradients(params: list[Tensor], versions: Any, flags: bytearray, keep: bool) -> None:
    """Return None: a fast path would gain nothing here."""


def take_gradients(params: list[Tensor], keep: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the gradients, and zeros for missing ones; with ``keep`` they may be overwritten.

    For DTensors these are the local parts. The dtypes are those of the parameters, or ``dtype``; the memory order is
    the parameters'.
    """
    taken = []
    for param in params:
        part = local(param)
        if param.grad is None:
            taken.append(torch.zeros_like(part, dtype=dtype))
        else:
            taken.append(as_like(take(param) if keep else local_gradient(param), part, dtype))
    return taken


def count_steps(steps: Sequence[Tensor], write: bool) -> list[float]:
    """Return counters plus 1: see :meth:`gam_fast.backends.base.Bookkeeping.count_steps`."""
    found: list[float] = (torch.stack(list(steps)) + 1.0).tolist()
    if write:
        torch._foreach_add_(list(steps), 1.0)
    return found
