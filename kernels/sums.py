"""The primitives that only read: sums of a chunk by its program, then of all chunks by one program a group.

A block has an accumulator for each of its elements in the working precision; they are added up in fp64. A sum of
squares of fp32 numbers is therefore off by (8 + 1) 2⁻²⁴ = 5.4e-7 of itself at most, however many there are. Everything
is added in an order that depends on the numbers of elements only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import OF_TERM, combine, factors_of, used_of
from .elements import GROUP, array, arrays, piece_of, read, read_all, working
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
    TYPE: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``parts[piece] ← Σ (T (a − b))²``; the number of a group: η"""
    row, begin, whole, length = piece_of(pieces, table, WIDTH, BLOCK)
    eta = tl.load(numbers + tl.load(row + GROUP))
    total = working(tl.zeros((BLOCK,), TYPE))
    for MASKED in tl.static_range(2):
        a = array(row, A, begin, TYPE, MASKED)
        b = array(row, B, begin, TYPE, MASKED)
        theta = array(row, THETA, begin, TYPE, MASKED)
        for at in range(whole if MASKED else 0, length if MASKED else whole, BLOCK):
            index = at + tl.arange(0, BLOCK)
            x = read(a, index, length, MASKED)
            if DIFFERENCE:
                x -= read(b, index, length, MASKED)
            if WEIGHTED:
                x = weigh(x, read(theta, index, length, MASKED), eta)
            total = tl.fma(x, x, total)
    tl.store(parts + tl.program_id(0), tl.sum(total.to(tl.float64)))


@triton.jit
def inner_products(
    pieces,
    table,
    numbers,
    parts,
    TYPE: tl.constexpr,
    TERMS: tl.constexpr,
    PARTLY: tl.constexpr,
    WITH_M: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``parts[3 piece:] ← Σ u², Σ m u, Σ m²``; the numbers of a group: the terms by the coefficients of u, then of m"""
    row, begin, whole, length = piece_of(pieces, table, WIDTH, BLOCK)
    terms = numbers + tl.load(row + GROUP) * (2 * OF_TERM * TERMS)
    used = used_of(terms, TERMS)
    of_u = factors_of(terms, 0.0, 1.0, TERMS)
    of_m = factors_of(terms + OF_TERM * TERMS, 0.0, 1.0, TERMS)
    uu = working(tl.zeros((BLOCK,), TYPE))
    um = uu
    mm = uu
    for MASKED in tl.static_range(2):
        pointers = arrays(row, 0, TERMS, begin, TYPE, MASKED)
        for at in range(whole if MASKED else 0, length if MASKED else whole, BLOCK):
            index = at + tl.arange(0, BLOCK)
            x = read_all(pointers, used, index, length, TERMS, PARTLY, MASKED)
            u = combine(x, of_u, used, TERMS, PARTLY)
            uu = tl.fma(u, u, uu)
            if WITH_M:
                m = combine(x, of_m, used, TERMS, PARTLY)
                um = tl.fma(m, u, um)
                mm = tl.fma(m, m, mm)
    part = parts + 3 * tl.program_id(0).to(tl.int64)
    tl.store(part, tl.sum(uu.to(tl.float64)))
    tl.store(part + 1, tl.sum(um.to(tl.float64)))
    tl.store(part + 2, tl.sum(mm.to(tl.float64)))


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
