"""Where tensors lie in memory: what kernels must know of their strides, and what they refuse.

The same rules as those of the compiled core (``csrc/call.cpp``, ``csrc/checks.cpp``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


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


@lru_cache(maxsize=1 << 14)
def overlaps_itself(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return whether two elements may share memory; said of some exotic layouts where none do.

    >>> overlaps_itself((2, 3), (3, 1)), overlaps_itself((2, 3), (0, 1))
    (False, True)
    """
    if math.prod(size) <= 1 or is_dense(size, stride):
        return False
    reach = 0
    for step, count in sorted((step, count) for step, count in zip(stride, size, strict=True) if count > 1):
        if step <= reach:
            return True
        reach += step * (count - 1)
    return False


def span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory, gaps included.

    >>> span(torch.zeros(4, 6)[:, ::2])
    23
    """
    if tensor.numel() == 0:
        return 0
    return 1 + sum(step * (count - 1) for step, count in zip(tensor.stride(), tensor.size(), strict=True))


def check_plain(name: str, tensor: Tensor, device: torch.device, written: bool) -> None:
    """Raises unless a kernel may take ``tensor`` by its address.

    Raises:
        RuntimeError: it requires grad, would be written, and gradients are enabled.
        TypeError: it is not strided, or a subclass or lazy view without memory of its own.
        ValueError: it is on another device, its storage is too small, or it would be written and overlaps itself.
    """
    if tensor.device != device and not tensor.device.type == device.type == "cpu":  # "cpu:0" is the CPU too
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be strided, got {tensor.layout}")
    is_subclass = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if is_subclass or torch._C._functorch.is_functorch_wrapped_tensor(tensor) or _is_lazy(tensor):
        raise TypeError(f"{name} must be a plain tensor with memory of its own, not a subclass or a lazy view")
    needed = (tensor.storage_offset() + span(tensor)) * tensor.element_size()
    if tensor.numel() and tensor.untyped_storage().nbytes() < needed:
        raise ValueError(
            f"{name} must have its elements in memory: its storage has {tensor.untyped_storage().nbytes()} bytes of "
            f"{needed}"
        )
    if written and tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} requires grad and would be written: call under torch.no_grad()")
    if written and overlaps_itself(tensor.size(), tensor.stride()):
        raise ValueError(f"{name} must not overlap itself in memory: give it memory of its own with clone()")


def _is_lazy(tensor: Tensor) -> bool:
    return tensor.is_neg() or tensor._is_zerotensor()


def layout_of(tensors: Sequence[Tensor]) -> list[int] | None:
    """How the arrays of one leaf are walked: ``None`` for all in the order of memory, else in logical order.

    A layout is the number of dimensions, the sizes, and for each array 1 and its strides, or 0 and as many unused
    words where it is contiguous. Arrays of address 0 are missing.
    """
    present = [tensor for tensor in tensors if tensor.data_ptr()]
    if not present:
        return None
    size, stride = present[0].size(), present[0].stride()
    if is_dense(size, stride) and all(tensor.stride() == stride for tensor in present):
        return None
    if all(tensor.is_contiguous() for tensor in present):
        return None
    layout = [len(size), *size]
    for tensor in tensors:
        given = tensor.data_ptr() and not tensor.is_contiguous()
        layout += (1, *tensor.stride()) if given else [0] * (1 + len(size))
    return layout


@dataclass(frozen=True)
class _Extent:
    """The bytes between the first and the last element of one tensor of a launch."""

    begin: int
    end: int
    leaf: int
    name: str
    written: bool
    tensor: Tensor


def check_overlaps(lists: Sequence[tuple[str, bool, Sequence[Tensor]]]) -> None:
    """Raises where memory that is written overlaps other memory, since elements are worked on in any order.

    An array may be both read and written as the very same tensor of the same leaf, and arrays may lie in each other's
    gaps.

    Args:
        lists: name, whether it is written, and one tensor a leaf.

    Raises:
        ValueError: names the two tensors.

    >>> values = torch.zeros(4)
    >>> check_overlaps([("a", True, [values[:3]]), ("b", False, [values[1:]])])
    Traceback (most recent call last):
    ValueError: a[0] and b[0] must not overlap in memory: give one of them memory of its own with clone()
    """
    extents = []
    for name, written, tensors in lists:
        for leaf, tensor in enumerate(tensors):
            begin = tensor.data_ptr()
            if begin:
                end = begin + span(tensor) * tensor.element_size()
                extents.append(_Extent(begin, end, leaf, f"{name}[{leaf}]", written, tensor))
    extents.sort(key=lambda extent: extent.begin)
    reaching: list[_Extent] = []  # those that reach beyond the one at hand
    for extent in extents:
        reaching = [before for before in reaching if before.end > extent.begin]
        for before in reaching:
            if (before.written or extent.written) and not _may_meet(before, extent):
                raise ValueError(
                    f"{before.name} and {extent.name} must not overlap in memory: give one of them memory of its own "
                    "with clone()"
                )
        reaching.append(extent)


def _may_meet(a: _Extent, b: _Extent) -> bool:
    x, y = a.tensor, b.tensor
    same = a.leaf == b.leaf and a.begin == b.begin and (x.stride() == y.stride() or x.numel() == 1)
    return (same and not (a.written and b.written)) or _are_interleaved(a, b)


def _are_interleaved(a: _Extent, b: _Extent) -> bool:
    """Return whether arrays of the same strides lie in each other's gaps: between columns, or as blocks of columns."""
    x, y, item = a.tensor, b.tensor, a.tensor.element_size()
    if x.stride() != y.stride() or item != y.element_size() or x.dim() == 0:
        return False
    strides = [step * item for step in x.stride()]
    row, step = max(strides), math.gcd(*strides)
    if step == 0:
        return False

    def inner(tensor: Tensor) -> int:  # bytes that a row spans
        steps = zip(strides, tensor.size(), strict=True)
        return item + sum(step * (count - 1) for step, count in steps if step != row)

    distance = b.begin - a.begin
    phase, column = distance % step, distance % row
    return item <= phase <= step - item or (column >= inner(x) and column + inner(y) <= row)
