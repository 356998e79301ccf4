"""The read-only primitives: one program sums each chunk, then one program per group sums its chunks.

A block has one accumulator per element in the working precision; the accumulators are added up in fp64. So the relative
error of a sum of squares of fp32 numbers is at most (8 + 1) 2⁻²⁴ = 5.4e-7, however many there are. The order of all
additions depends only on the numbers of elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import OF_TERM, combine, factors_of, used_of
from .elements import GROUP, array, arrays, piece_of, read, read_all, working
from .formulas import weigh

# The lists: θ (may be missing), then the terms.
THETA = tl.constexpr(0)
TERM = tl.constexpr(1)


@triton.jit
def sums(
    pieces,
    table,
    numbers,
    parts,
    TYPE: tl.constexpr,
    TERMS: tl.constexpr,
    PARTLY: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WITH_M: tl.constexpr,
    SUMS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``parts[SUMS piece:] ←`` Σ (T u)² and, for 3 sums, Σ m u and Σ m².

    The numbers of a group are η, the terms by the coefficients of u, and ``WITH_M`` the terms by those of m.
    """
    row, begin, whole, length = piece_of(pieces, table, WIDTH, BLOCK)
    group = numbers + tl.load(row + GROUP) * (1 + (1 + WITH_M) * OF_TERM * TERMS)
    eta = tl.load(group)
    used = used_of(group + 1, TERMS)
    of_u = factors_of(group + 1, 0.0, 1.0, TERMS)
    if WITH_M:
        of_m = factors_of(group + 1 + OF_TERM * TERMS, 0.0, 1.0, TERMS)
    uu = working(tl.zeros((BLOCK,), TYPE))
    um = uu
    mm = uu
    for MASKED in tl.static_range(2):
        theta = array(row, THETA, begin, TYPE, MASKED)
        pointers = arrays(row, TERM, TERMS, begin, TYPE, MASKED)
        for at in range(whole if MASKED else 0, length if MASKED else whole, BLOCK):
            index = at + tl.arange(0, BLOCK)
            x = read_all(pointers, used, index, length, TERMS, PARTLY, MASKED)
            u = combine(x, of_u, used, TERMS, PARTLY)
            if WEIGHTED:
                u = weigh(u, read(theta, index, length, MASKED), eta)
            uu = tl.fma(u, u, uu)
            if WITH_M:
                m = combine(x, of_m, used, TERMS, PARTLY)
                um = tl.fma(m, u, um)
                mm = tl.fma(m, m, mm)
    part = parts + SUMS * tl.program_id(0).to(tl.int64)
    tl.store(part, tl.sum(uu.to(tl.float64)))
    if SUMS == 3:
        tl.store(part + 1, tl.sum(um.to(tl.float64)))
        tl.store(part + 2, tl.sum(mm.to(tl.float64)))


@triton.jit
def totals(parts, starts, out, SUMS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute ``out[SUMS group:] ←`` the sums over the pieces ``starts[group]`` to ``starts[group + 1]``."""
    group = tl.program_id(0)
    first = tl.load(starts + group)
    last = tl.load(starts + group + 1)
    uu = tl.zeros((BLOCK,), tl.float64)
    um = uu
    mm = uu
    for at in range(first, last, BLOCK):  # all sums in one loop: a single program waits for each of its reads
        piece = at + tl.arange(0, BLOCK)
        inside = piece < last
        uu += tl.load(parts + SUMS * piece, mask=inside, other=0.0)
        if SUMS == 3:
            um += tl.load(parts + SUMS * piece + 1, mask=inside, other=0.0)
            mm += tl.load(parts + SUMS * piece + 2, mask=inside, other=0.0)
    tl.store(out + SUMS * group, tl.sum(uu))
    if SUMS == 3:
        tl.store(out + SUMS * group + 1, tl.sum(um))
        tl.store(out + SUMS * group + 2, tl.sum(mm))
