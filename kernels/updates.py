"""The steps of base optimizers, in one kernel. All inputs of a block are read before anything is written."""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as host
from .combine import OF_TERM, combine, factors_of, kappa_and_scale, used_of
from .elements import GROUP, HEADER, OPTION, array, arrays, numbers_at, piece_of, read, read_all, write, write_if

# The lists: these, then the terms, then the state, whose last lists may be missing.
PARAMS = tl.constexpr(0)
THETA = tl.constexpr(1)
TERM = tl.constexpr(2)

MOST_STATES = tl.constexpr(max(states for _, _, states in host.FORMULAS.values()))


@triton.jit(do_not_specialize=["rows"])
def update(
    pieces,
    table,
    numbers,
    products,
    clipping,
    of_leaves,
    rows,
    FORMULA: tl.constexpr,
    OF_GROUP: tl.constexpr,
    OF_LEAF: tl.constexpr,
    STATES: tl.constexpr,
    LACKED: tl.constexpr,
    TYPE: tl.constexpr,
    TERMS: tl.constexpr,
    PARTLY: tl.constexpr,
    PROJECT: tl.constexpr,
    CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``params ←`` θ after a step along d by ``FORMULA``, and advance the state.

    The numbers of a group are those of the formula, then the terms; ``of_leaves`` are those of leaves. ``LACKED``
    is a bit mask of the state lists that some leaf does not have.
    """
    row, begin, whole, length = piece_of(pieces, table, WIDTH, BLOCK)
    group = numbers + tl.load(row + GROUP) * (OF_GROUP + OF_TERM * TERMS)
    of_group = numbers_at(group, OF_GROUP)
    of_leaf = numbers_at(of_leaves + tl.load(row + OPTION) * OF_LEAF, OF_LEAF)
    kappa, scale = kappa_and_scale(products, clipping, rows, PROJECT, CLIP, ROWS)
    used = used_of(group + OF_GROUP, TERMS)
    factors = factors_of(group + OF_GROUP, kappa, scale, TERMS)
    has = ()
    for s in tl.static_range(STATES):
        has += (tl.load(row + (HEADER + TERM + TERMS + s)) != 0,)
    for MASKED in tl.static_range(2):
        params = array(row, PARAMS, begin, TYPE, MASKED)
        theta = array(row, THETA, begin, TYPE, MASKED)
        terms = arrays(row, TERM, TERMS, begin, TYPE, MASKED)
        states = arrays(row, TERM + TERMS, STATES, begin, TYPE, MASKED)
        for at in range(whole if MASKED else 0, length if MASKED else whole, BLOCK):
            index = at + tl.arange(0, BLOCK)
            x = read_all(terms, used, index, length, TERMS, PARTLY, MASKED)
            origin = read(theta, index, length, MASKED)
            state = read_all(states, has, index, length, STATES, LACKED, MASKED)
            for _ in tl.static_range(STATES, MOST_STATES):  # lists that no leaf has
                state += (tl.zeros_like(origin),)
            moved, state = FORMULA(combine(x, factors, used, TERMS, PARTLY), origin, state, of_group, of_leaf)
            for s in tl.static_range(STATES):
                if LACKED & (1 << s):
                    write_if(states[s], index, state[s], length, has[s], MASKED)
                else:
                    write(states[s], index, state[s], length, MASKED)
            write(params, index, moved, length, MASKED)
