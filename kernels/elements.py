"""Reads and writes of the elements of tensor lists; :mod:`.table` describes the arguments of a launch.

A kernel is compiled for one dtype. It runs over its piece twice: over the whole blocks of a packed leaf without masks,
then over the rest with ``MASKED``. Launches must not contract ``a * b + c`` (``enable_fp_fusion=False``): fused
operations are written as ``fma``, so that results have the bits of the compiled core.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as host

GROUP = tl.constexpr(host.GROUP)
OPTION = tl.constexpr(host.OPTION)
PACKED = tl.constexpr(host.PACKED)
HEADER = tl.constexpr(host.HEADER)


@triton.jit
def piece_of(pieces, table, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the row of this program's leaf, its first element, and its length in whole blocks and in all."""
    piece = pieces + 3 * tl.program_id(0).to(tl.int64)
    row = table + tl.load(piece) * WIDTH
    length = tl.load(piece + 2).to(tl.int32)
    whole = tl.where(tl.load(row + PACKED) != 0, length // BLOCK * BLOCK, 0)
    return row, tl.load(piece + 1), whole, length


@triton.jit
def numbers_at(pointer, COUNT: tl.constexpr):
    """Return the ``COUNT`` numbers at the pointer."""
    found = ()
    for i in tl.static_range(COUNT):
        found += (tl.load(pointer + i),)
    return found


@triton.jit
def flag(number):
    """Return whether the number is not 0, through an integer: the interpreter makes no usable mask of fp64."""
    return tl.load(number).to(tl.int32) != 0


@triton.jit
def array(row, LIST: tl.constexpr, begin, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """Return a pointer to the piece in the array of a list."""
    pointer = tl.load(row + (HEADER + LIST)).to(tl.pointer_type(TYPE)) + begin
    if not MASKED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def arrays(row, LIST: tl.constexpr, COUNT: tl.constexpr, begin, TYPE: tl.constexpr, MASKED: tl.constexpr):
    """Return the pointers of :func:`array` for ``COUNT`` lists, from number ``LIST`` on."""
    found = ()
    for i in tl.static_range(COUNT):
        found += (array(row, LIST + i, begin, TYPE, MASKED),)
    return found


@triton.jit
def load(pointer, index, length, MASKED: tl.constexpr):
    """Return the elements in their stored dtype."""
    if MASKED:
        return tl.load(pointer + index, mask=index < length, other=0)
    else:
        return tl.load(pointer + index)


@triton.jit
def working(value):
    """Convert elements to the working precision."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


@triton.jit
def read(pointer, index, length, MASKED: tl.constexpr):
    """Return the elements in the working precision."""
    return working(load(pointer, index, length, MASKED))


@triton.jit
def read_if(pointer, index, length, some, MASKED: tl.constexpr):
    """Return the elements as :func:`read` if ``some``; otherwise return 0 without reading."""
    if MASKED:
        return working(tl.load(pointer + index, mask=(index < length) & some, other=0))
    else:
        return working(tl.load(pointer + index, mask=some, other=0))


@triton.jit
def read_all(pointers, used, index, length, COUNT: tl.constexpr, PARTLY: tl.constexpr, MASKED: tl.constexpr):
    """Return the elements of each array; those with a bit in ``PARTLY`` are read only if ``used``."""
    found = ()
    for i in tl.static_range(COUNT):
        if PARTLY & (1 << i):
            found += (read_if(pointers[i], index, length, used[i], MASKED),)
        else:
            found += (read(pointers[i], index, length, MASKED),)
    return found


@triton.jit
def write(pointer, index, value, length, MASKED: tl.constexpr):
    """Store elements, rounded to the array's dtype."""
    if MASKED:
        tl.store(pointer + index, value.to(pointer.dtype.element_ty), mask=index < length)
    else:
        tl.store(pointer + index, value.to(pointer.dtype.element_ty))


@triton.jit
def write_if(pointer, index, value, length, some, MASKED: tl.constexpr):
    """Store elements as :func:`write` if ``some``; otherwise do nothing."""
    if MASKED:
        tl.store(pointer + index, value.to(pointer.dtype.element_ty), mask=(index < length) & some)
    else:
        tl.store(pointer + index, value.to(pointer.dtype.element_ty), mask=some)
