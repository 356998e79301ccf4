"""The primitives that only read: sums of a chunk by its program, then of all chunks by one program a group.

A block has an accumulator for each of its elements in the working precision; they are added up in fp64. A sum of
squares of fp32 numbers is therefore off by (8 + 1) 2⁻²⁴ = 5.4e-7 of itself at most, however many there are. Everything
is added in an order that depends on the numbers of elements only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import OF_TERM, arrays_of, combine, factors_of, read_terms
from .elements import (
    CODES,
    GROUP,
    PARAMETER,
    WORKING,
    array,
    has_types,
    indices,
    inside_of,
    piece_of,
    place,
    read,
    whole_blocks,
)
from .formulas import weigh

# The lists of square_norm, of which B and THETA may be missing. Those of inner_products are the terms.
A = tl.constexpr(0)
B = tl.constexpr(1)
THETA = tl.constexpr(2)


@triton.jit
def square_norm(
    pieces,
    table,
    numbers,
    parts,
    AMONG: tl.constexpr,
    STRIDED: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``parts[piece] ← Σ (T (a − b))²``; the number of a group: η"""
    leaf, begin, length = piece_of(pieces)
    row = table + leaf * WIDTH
    eta = tl.load(numbers + tl.load(row + GROUP)) if WEIGHTED else 0.0
    whole = whole_blocks(row, length, BLOCK)
    for CODE in tl.static_range(CODES):
        if AMONG & (1 << CODE):
            if has_types(row, CODE, AMONG):
                total = tl.zeros((BLOCK,), WORKING[CODE])
                total = _add_squares(
                    total, table, row, begin, 0, whole, eta, CODE, DIFFERENCE, WEIGHTED, BLOCK, False, False
                )
                total = _add_squares(
                    total, table, row, begin, whole, length, eta, CODE, DIFFERENCE, WEIGHTED, BLOCK, True, STRIDED
                )
                tl.store(parts + tl.program_id(0), tl.sum(total.to(tl.float64)))


@triton.jit
def _add_squares(
    total,
    table,
    row,
    begin,
    start,
    stop,
    eta,
    CODE: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
):
    TYPE: tl.constexpr = PARAMETER[CODE]
    WORK: tl.constexpr = WORKING[CODE]
    a = array(row, A, begin, TYPE, MASKED, STRIDED)
    if DIFFERENCE:
        b = array(row, B, begin, TYPE, MASKED, STRIDED)
    if WEIGHTED:
        theta = array(row, THETA, begin, TYPE, MASKED, STRIDED)
        eta = eta.to(WORK)
    for at in range(start, stop, BLOCK):
        index = indices(begin, at, BLOCK, STRIDED)
        inside = inside_of(at, stop, BLOCK)
        x = read(a, place(table, row, A, index, STRIDED), inside, MASKED).to(WORK)
        if DIFFERENCE:
            x -= read(b, place(table, row, B, index, STRIDED), inside, MASKED).to(WORK)
        if WEIGHTED:
            x = weigh(x, read(theta, place(table, row, THETA, index, STRIDED), inside, MASKED).to(WORK), eta)
        total = tl.fma(x, x, total)
    return total


@triton.jit
def inner_products(
    pieces,
    table,
    numbers,
    parts,
    AMONG: tl.constexpr,
    STRIDED: tl.constexpr,
    TERMS: tl.constexpr,
    PARTLY: tl.constexpr,
    WITH_M: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``parts[3 piece:] ← Σ u², Σ m u, Σ m²``; the numbers of a group: the terms by the coefficients of u, then of m"""
    leaf, begin, length = piece_of(pieces)
    row = table + leaf * WIDTH
    terms = numbers + tl.load(row + GROUP) * (2 * OF_TERM * TERMS)
    whole = whole_blocks(row, length, BLOCK)
    for CODE in tl.static_range(CODES):
        if AMONG & (1 << CODE):
            if has_types(row, CODE, AMONG):
                uu = tl.zeros((BLOCK,), WORKING[CODE])
                um = tl.zeros((BLOCK,), WORKING[CODE])
                mm = tl.zeros((BLOCK,), WORKING[CODE])
                uu, um, mm = _add_products(
                    uu, um, mm, table, row, begin, 0, whole, terms, CODE, TERMS, PARTLY, WITH_M, BLOCK, False, False
                )
                uu, um, mm = _add_products(
                    uu, um, mm, table, row, begin, whole, length, terms, CODE,
                    TERMS, PARTLY, WITH_M, BLOCK, True, STRIDED,
                )  # fmt: skip
                part = parts + 3 * tl.program_id(0).to(tl.int64)
                tl.store(part, tl.sum(uu.to(tl.float64)))
                tl.store(part + 1, tl.sum(um.to(tl.float64)))
                tl.store(part + 2, tl.sum(mm.to(tl.float64)))


@triton.jit
def _add_products(
    uu,
    um,
    mm,
    table,
    row,
    begin,
    start,
    stop,
    terms,
    CODE: tl.constexpr,
    TERMS: tl.constexpr,
    PARTLY: tl.constexpr,
    WITH_M: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
):
    WORK: tl.constexpr = WORKING[CODE]
    first, second, third = arrays_of(row, 0, begin, TERMS, PARAMETER[CODE], MASKED, STRIDED)
    u1, u2, u3 = factors_of(terms, 0.0, 1.0, TERMS, WORK)
    m1, m2, m3 = factors_of(terms + OF_TERM * TERMS, 0.0, 1.0, TERMS, WORK)
    for at in range(start, stop, BLOCK):
        index = indices(begin, at, BLOCK, STRIDED)
        inside = inside_of(at, stop, BLOCK)
        x, y, z = read_terms(
            table, row, first, second, third, terms, index, inside, 0, TERMS, WORK, PARTLY, MASKED, STRIDED
        )
        u = combine(x, y, z, u1, u2, u3, terms, TERMS, PARTLY)
        uu = tl.fma(u, u, uu)
        if WITH_M:
            m = combine(x, y, z, m1, m2, m3, terms, TERMS, PARTLY)
            um = tl.fma(m, u, um)
            mm = tl.fma(m, m, mm)
    return uu, um, mm


@triton.jit
def totals(parts, starts, out, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """``out[SUMS group:] ←`` the sums over a group's pieces, ``starts[group]`` to ``starts[group + 1]``"""
    group = tl.program_id(0)
    first = tl.load(starts + group)
    last = tl.load(starts + group + 1)
    for k in tl.static_range(SUMS):
        total = tl.zeros((BLOCK,), tl.float64)
        for at in range(first, last, BLOCK):
            piece = at + tl.arange(0, BLOCK)
            total += tl.load(parts + SUMS * piece + k, mask=piece < last, other=0.0)
        tl.store(out + SUMS * group + k, tl.sum(total))
