"""The primitives that move parameters, or write a combination.

Of a block everything is read before anything that may be the same array is written: an argument may be the very array
that is written, but may not overlap it otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as host
from .combine import OF_TERM, arrays_of, combine, factors_of, kappa_and_scale, read_terms
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
    write,
)
from .formulas import folded, inverse_norm, perturbed, weigh

# The lists of perturb: B, INTO and OTHER may be missing, BACKUP unless it is needed.
PARAMS = tl.constexpr(0)
BACKUP = tl.constexpr(1)
A = tl.constexpr(2)
B = tl.constexpr(3)
INTO = tl.constexpr(4)
OTHER = tl.constexpr(5)

RADIUS = tl.constexpr(host.PERTURB.index("radius"))
ETA = tl.constexpr(host.PERTURB.index("eta"))
K = tl.constexpr(host.PERTURB.index("k"))
L = tl.constexpr(host.PERTURB.index("l"))
OF_PERTURB = tl.constexpr(len(host.PERTURB))


@triton.jit(do_not_specialize=["ticket"])
def perturb(
    pieces,
    table,
    numbers,
    square,
    mark,
    ticket,
    AMONG: tl.constexpr,
    STRIDED: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SAVE: tl.constexpr,
    FROM_START: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``params ← origin + radius / (√square + ξ) T² (a − b)``, with ``SAVE`` a copy of the parameters to the backup
    first, with ``FOLDED`` a fold. The origin is the backup with ``FROM_START``. A launch that saves leaves a ticket."""
    leaf, begin, length = piece_of(pieces)
    row = table + leaf * WIDTH
    group = numbers + tl.load(row + GROUP) * OF_PERTURB
    factor = inverse_norm(tl.load(square)) * tl.load(group + RADIUS)
    if SAVE:
        tl.store(mark, ticket, mask=tl.program_id(0) == 0)
    whole = whole_blocks(row, length, BLOCK)
    for CODE in tl.static_range(CODES):
        if AMONG & (1 << CODE):
            if has_types(row, CODE, AMONG):
                _perturb(
                    table, row, begin, 0, whole, group, factor, CODE,
                    DIFFERENCE, WEIGHTED, SAVE, FROM_START, FOLDED, BLOCK, False, False,
                )  # fmt: skip
                _perturb(
                    table, row, begin, whole, length, group, factor, CODE,
                    DIFFERENCE, WEIGHTED, SAVE, FROM_START, FOLDED, BLOCK, True, STRIDED,
                )  # fmt: skip


@triton.jit
def _perturb(
    table,
    row,
    begin,
    start,
    stop,
    group,
    factor,
    CODE: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SAVE: tl.constexpr,
    FROM_START: tl.constexpr,
    FOLDED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
):
    TYPE: tl.constexpr = PARAMETER[CODE]
    WORK: tl.constexpr = WORKING[CODE]
    FROM_BACKUP: tl.constexpr = FROM_START and not SAVE
    factor = factor.to(WORK)
    eta = tl.load(group + ETA).to(WORK)
    params = array(row, PARAMS, begin, TYPE, MASKED, STRIDED)
    backup = array(row, BACKUP, begin, TYPE, MASKED, STRIDED)
    a = array(row, A, begin, TYPE, MASKED, STRIDED)
    b = array(row, B, begin, TYPE, MASKED, STRIDED)
    if FOLDED:
        into = array(row, INTO, begin, TYPE, MASKED, STRIDED)
        other = array(row, OTHER, begin, TYPE, MASKED, STRIDED)
        k = tl.load(group + K).to(WORK)
        l = tl.load(group + L).to(WORK)  # noqa: E741
    for at in range(start, stop, BLOCK):
        index = indices(begin, at, BLOCK, STRIDED)
        inside = inside_of(at, stop, BLOCK)
        of_params = place(table, row, PARAMS, index, STRIDED)
        if SAVE or FROM_START or WEIGHTED:
            of_backup = place(table, row, BACKUP, index, STRIDED)
        if FROM_BACKUP:
            stored = read(backup, of_backup, inside, MASKED)
        else:
            stored = read(params, of_params, inside, MASKED)
        v = read(a, place(table, row, A, index, STRIDED), inside, MASKED).to(WORK)
        if DIFFERENCE:
            v -= read(b, place(table, row, B, index, STRIDED), inside, MASKED).to(WORK)
        if WEIGHTED:
            theta = stored.to(WORK)
            if not (SAVE or FROM_START):  # the origin is not θ
                theta = read(backup, of_backup, inside, MASKED).to(WORK)
            v = weigh(weigh(v, theta, eta), theta, eta)
        # The fold may overwrite a or b: all is read by all threads before anything is written.
        if FOLDED:
            of_into = place(table, row, INTO, index, STRIDED)
            x = read(into, of_into, inside, MASKED).to(WORK)
            y = read(other, place(table, row, OTHER, index, STRIDED), inside, MASKED).to(WORK)
            tl.debug_barrier()
        if SAVE:
            write(backup, of_backup, stored, inside, MASKED)
        write(params, of_params, perturbed(stored.to(WORK), v, factor), inside, MASKED)
        if FOLDED:
            write(into, of_into, folded(x, y, k, l), inside, MASKED)


@triton.jit
def _copy(
    table,
    row,
    begin,
    start,
    stop,
    CODE: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
):
    source = array(row, LIST, begin, PARAMETER[CODE], MASKED, STRIDED)
    target = array(row, LIST + 1, begin, PARAMETER[CODE], MASKED, STRIDED)
    for at in range(start, stop, BLOCK):
        index = indices(begin, at, BLOCK, STRIDED)
        inside = inside_of(at, stop, BLOCK)
        value = read(source, place(table, row, LIST, index, STRIDED), inside, MASKED)
        write(target, place(table, row, LIST + 1, index, STRIDED), value, inside, MASKED)


# The lists of materialise; FROM and TO, the backup and the parameters, may be missing.
OUT = tl.constexpr(0)
FROM = tl.constexpr(1)
TERM = tl.constexpr(3)


@triton.jit(do_not_specialize=["rows"])
def materialise(
    pieces,
    table,
    numbers,
    products,
    clipping,
    rows,
    AMONG: tl.constexpr,
    STRIDED: tl.constexpr,
    TERMS: tl.constexpr,
    PARTLY: tl.constexpr,
    PROJECT: tl.constexpr,
    CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    RESTORE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out ← d``, and with ``RESTORE`` the parameters from the backup; the numbers of a group: its terms"""
    leaf, begin, length = piece_of(pieces)
    row = table + leaf * WIDTH
    terms = numbers + tl.load(row + GROUP) * (OF_TERM * TERMS)
    kappa, scale = kappa_and_scale(products, clipping, rows, PROJECT, CLIP, ROWS)
    whole = whole_blocks(row, length, BLOCK)
    for CODE in tl.static_range(CODES):
        if AMONG & (1 << CODE):
            if has_types(row, CODE, AMONG):
                _materialise(table, row, begin, 0, whole, terms, kappa, scale, CODE, TERMS, PARTLY, BLOCK, False, False)
                _materialise(
                    table, row, begin, whole, length, terms, kappa, scale, CODE, TERMS, PARTLY, BLOCK, True, STRIDED
                )
                if RESTORE:
                    _copy(table, row, begin, 0, whole, CODE, FROM, BLOCK, False, False)
                    _copy(table, row, begin, whole, length, CODE, FROM, BLOCK, True, STRIDED)


@triton.jit
def _materialise(
    table,
    row,
    begin,
    start,
    stop,
    terms,
    kappa,
    scale,
    CODE: tl.constexpr,
    TERMS: tl.constexpr,
    PARTLY: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
):
    WORK: tl.constexpr = WORKING[CODE]
    first, second, third = arrays_of(row, TERM, begin, TERMS, PARAMETER[CODE], MASKED, STRIDED)
    f1, f2, f3 = factors_of(terms, kappa, scale, TERMS, WORK)
    out = array(row, OUT, begin, PARAMETER[CODE], MASKED, STRIDED)
    for at in range(start, stop, BLOCK):
        index = indices(begin, at, BLOCK, STRIDED)
        inside = inside_of(at, stop, BLOCK)
        x, y, z = read_terms(
            table, row, first, second, third, terms, index, inside, TERM, TERMS, WORK, PARTLY, MASKED, STRIDED
        )
        d = combine(x, y, z, f1, f2, f3, terms, TERMS, PARTLY)
        write(out, place(table, row, OUT, index, STRIDED), d, inside, MASKED)
