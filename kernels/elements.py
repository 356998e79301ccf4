"""How a kernel reads and writes the elements of the lists of tensors; what it gets of them is in :mod:`.table`.

A kernel is compiled for a set of types, mostly of one. Launches must not contract ``a * b + c``
(``enable_fp_fusion=False``): what is fused says ``fma``, so that results have the bits of the compiled core.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as host

GROUP = tl.constexpr(host.GROUP)
OPTION = tl.constexpr(host.OPTION)
TYPES = tl.constexpr(host.TYPES)
PACKED = tl.constexpr(host.PACKED)
LAYOUT = tl.constexpr(host.LAYOUT)
HEADER = tl.constexpr(host.HEADER)

# By the code of a row: the types of the arrays and of the arithmetic.
PARAMETER = tl.constexpr(tuple(getattr(tl, name) for name in host.PARAMETERS))
WORKING = tl.constexpr(tuple(tl.float64 if name == "float64" else tl.float32 for name in host.PARAMETERS))
CODES = tl.constexpr(len(host.PARAMETERS))


@triton.jit
def piece_of(pieces):
    """Leaf, first element and number of elements of this program."""
    piece = pieces + 3 * tl.program_id(0).to(tl.int64)
    return tl.load(piece), tl.load(piece + 1), tl.load(piece + 2).to(tl.int32)


@triton.jit
def has_types(row, CODE: tl.constexpr, AMONG: tl.constexpr):
    """Whether the leaf is of these types, where the launch has those of the bits of ``AMONG``."""
    if AMONG == 1 << CODE:
        return True
    else:
        return tl.load(row + TYPES) == CODE


@triton.jit
def flag(number):
    """Whether the number there is not 0: from an integer, because of fp64 the interpreter makes no usable mask."""
    return tl.load(number).to(tl.int32) != 0


@triton.jit
def whole_blocks(row, length, BLOCK: tl.constexpr):
    """How many of the elements are read in whole blocks without a mask."""
    return tl.where(tl.load(row + PACKED) != 0, length // BLOCK * BLOCK, 0)


@triton.jit
def array(row, LIST: tl.constexpr, begin, TYPE: tl.constexpr, MASKED: tl.constexpr, STRIDED: tl.constexpr):
    """Where the elements of a list are counted from: the piece's first, or, of any layout, the leaf's."""
    pointer = tl.load(row + (HEADER + LIST)).to(tl.pointer_type(TYPE))
    if not STRIDED:
        pointer += begin
    if not MASKED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def indices(begin, at, BLOCK: tl.constexpr, STRIDED: tl.constexpr):
    """The elements of a block, counted as :func:`array` counts."""
    index = at + tl.arange(0, BLOCK)
    if STRIDED:
        return begin + index
    else:
        return index


@triton.jit
def inside_of(at, stop, BLOCK: tl.constexpr):
    """Which elements of a block there are."""
    return at + tl.arange(0, BLOCK) < stop


@triton.jit
def place(table, row, LIST: tl.constexpr, index, STRIDED: tl.constexpr):
    """Where the elements of these indices, in logical order, lie in the array of a list."""
    if STRIDED:
        layout = table + tl.load(row + LAYOUT)
        dims = tl.load(layout)
        sizes = layout + 1
        own = sizes + dims + LIST * (1 + dims)
        offset = index
        if tl.load(own) != 0:
            offset = tl.zeros_like(index)
            for step in range(0, dims):
                d = dims - 1 - step
                size = tl.load(sizes + d)
                rest = index // size
                offset += (index - rest * size) * tl.load(own + 1 + d)
                index = rest
        return offset
    else:
        return index


@triton.jit
def read(pointer, offset, inside, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointer + offset, mask=inside, other=0)
    else:
        return tl.load(pointer + offset)


@triton.jit
def read_some(pointer, offset, inside, some, MASKED: tl.constexpr):
    """As :func:`read`; nothing is read, and the elements are 0, unless ``some``."""
    if MASKED:
        return tl.load(pointer + offset, mask=inside & some, other=0)
    else:
        return tl.load(pointer + offset, mask=some, other=0)


@triton.jit
def write(pointer, offset, value, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=inside)
    else:
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty))


@triton.jit
def write_some(pointer, offset, value, inside, some, MASKED: tl.constexpr):
    """As :func:`write`, but nothing unless ``some``."""
    if MASKED:
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=inside & some)
    else:
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=some)
