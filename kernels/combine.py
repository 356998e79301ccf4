"""The combination Σ factor X of terms, whose factors may follow from sums that lie in the memory of the device.

The numbers of a group end with three for each term: p, q, and whether the group uses the term (1 or 0). What a group
does not use is not read: its elements may be anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as host
from .elements import array, flag, place, read, read_some
from .formulas import clip_factor, ratio, square_of_direction

P = tl.constexpr(host.TERM.index("p"))
Q = tl.constexpr(host.TERM.index("q"))
USED = tl.constexpr(host.TERM.index("used"))
OF_TERM = tl.constexpr(len(host.TERM))


@triton.jit
def kappa_and_scale(products, clipping, rows, PROJECT: tl.constexpr, CLIP: tl.constexpr, ROWS: tl.constexpr):
    """κ and s of a direction: 0 and 1 where they are not asked for.

    ``products`` has ``rows`` times ‖u‖², ⟨m,u⟩, ‖m‖²; ``clipping`` the limit, then γ of each row.
    """
    kappa = tl.full((), 0.0, tl.float64)
    scale = tl.full((), 1.0, tl.float64)
    if PROJECT or CLIP:
        row = tl.arange(0, ROWS)
        inside = row < rows
        uu = tl.load(products + 3 * row, mask=inside, other=0.0)
        um = tl.load(products + 3 * row + 1, mask=inside, other=0.0)
        if PROJECT:
            kappa = ratio(tl.sum(um), tl.sum(uu))
        if CLIP:
            square = uu
            if PROJECT:
                mm = tl.load(products + 3 * row + 2, mask=inside, other=0.0)
                gamma = tl.load(clipping + 1 + row, mask=inside, other=0.0)
                square = square_of_direction(uu, um, mm, gamma, kappa)
            scale = clip_factor(tl.sum(square), tl.load(clipping))
    return kappa, scale


@triton.jit
def factor_of(term, kappa, scale):
    return scale * (kappa * tl.load(term + Q) + tl.load(term + P))


@triton.jit
def factors_of(terms, kappa, scale, TERMS: tl.constexpr, TYPE: tl.constexpr):
    """``s (p + κ q)`` of each term, rounded to the working precision; those beyond ``TERMS`` are not used"""
    first = factor_of(terms, kappa, scale).to(TYPE)
    second = first
    third = first
    if TERMS > 1:
        second = factor_of(terms + OF_TERM, kappa, scale).to(TYPE)
    if TERMS > 2:
        third = factor_of(terms + 2 * OF_TERM, kappa, scale).to(TYPE)
    return first, second, third


@triton.jit
def arrays_of(
    row, LIST: tl.constexpr, begin, TERMS: tl.constexpr, TYPE: tl.constexpr, MASKED: tl.constexpr, STRIDED: tl.constexpr
):
    """The arrays of the terms, whose lists start at number ``LIST``; those beyond ``TERMS`` are the first again"""
    first = array(row, LIST, begin, TYPE, MASKED, STRIDED)
    second = first
    third = first
    if TERMS > 1:
        second = array(row, LIST + 1, begin, TYPE, MASKED, STRIDED)
    if TERMS > 2:
        third = array(row, LIST + 2, begin, TYPE, MASKED, STRIDED)
    return first, second, third


@triton.jit
def read_term(
    table,
    row,
    pointer,
    terms,
    index,
    inside,
    TERM: tl.constexpr,
    LIST: tl.constexpr,
    PARTLY: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
):
    offset = place(table, row, LIST + TERM, index, STRIDED)
    if PARTLY:
        return read_some(pointer, offset, inside, flag(terms + (OF_TERM * TERM + USED)), MASKED)
    else:
        return read(pointer, offset, inside, MASKED)


@triton.jit
def read_terms(
    table,
    row,
    first,
    second,
    third,
    terms,
    index,
    inside,
    LIST: tl.constexpr,
    TERMS: tl.constexpr,
    TYPE: tl.constexpr,
    PARTLY: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
):
    """A block of each term in the working precision; ``PARTLY`` where there are groups that do not use all of them"""
    x = read_term(table, row, first, terms, index, inside, 0, LIST, PARTLY, MASKED, STRIDED).to(TYPE)
    y = x
    z = x
    if TERMS > 1:
        y = read_term(table, row, second, terms, index, inside, 1, LIST, PARTLY, MASKED, STRIDED).to(TYPE)
    if TERMS > 2:
        z = read_term(table, row, third, terms, index, inside, 2, LIST, PARTLY, MASKED, STRIDED).to(TYPE)
    return x, y, z


@triton.jit
def add_term(total, factor, x, terms, TERM: tl.constexpr, PARTLY: tl.constexpr):
    if PARTLY:
        return tl.where(flag(terms + (OF_TERM * TERM + USED)), tl.fma(factor, x, total), total)
    else:
        return tl.fma(factor, x, total)


@triton.jit
def combine(x, y, z, first, second, third, terms, TERMS: tl.constexpr, PARTLY: tl.constexpr):
    """``first x + second y + third z``, of the terms that there are"""
    total = first * x
    if TERMS > 1:
        total = add_term(total, second, y, terms, 1, PARTLY)
    if TERMS > 2:
        total = add_term(total, third, z, terms, 2, PARTLY)
    return total
