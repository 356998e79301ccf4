"""The steps of the base optimizers. Of a block everything is read before anything is written.

Options are numbers of a group: 0 and 1, or the sign 1 and −1. What a leaf or a group has no use for is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as host
from .combine import OF_TERM, arrays_of, combine, factors_of, kappa_and_scale, read_terms
from .elements import (
    CODES,
    GROUP,
    HEADER,
    OPTION,
    PARAMETER,
    WORKING,
    array,
    flag,
    has_types,
    indices,
    inside_of,
    piece_of,
    place,
    read,
    read_some,
    whole_blocks,
    write,
    write_some,
)
from .formulas import adam_average, adam_moved, adam_square, sgd_buffer, sgd_gradient

# The lists of both; those of sgd go on with BUFFER, which a leaf without momentum has not, and the terms, those of adam
# with AVERAGE, SQUARE, LARGEST, which a group without amsgrad has not, and the terms.
PARAMS = tl.constexpr(0)
THETA = tl.constexpr(1)
BUFFER = tl.constexpr(2)
SGD_TERM = tl.constexpr(3)
AVERAGE = tl.constexpr(2)
SQUARE = tl.constexpr(3)
LARGEST = tl.constexpr(4)
ADAM_TERM = tl.constexpr(5)

# The numbers of a group: these, and then those of the terms.
SGD_LR = tl.constexpr(host.SGD.index("lr"))
SGD_SIGN = tl.constexpr(host.SGD.index("sign"))
SGD_DECAY = tl.constexpr(host.SGD.index("weight_decay"))
SGD_MOMENTUM = tl.constexpr(host.SGD.index("momentum"))
SGD_UNDAMPED = tl.constexpr(host.SGD.index("undamped"))
SGD_NESTEROV = tl.constexpr(host.SGD.index("nesterov"))
OF_SGD = tl.constexpr(len(host.SGD))

ADAM_SIGN = tl.constexpr(host.ADAM.index("sign"))
ADAM_DECAY = tl.constexpr(host.ADAM.index("weight_decay"))
ADAM_SHRINK = tl.constexpr(host.ADAM.index("shrink"))
ADAM_BETA1_TO_1 = tl.constexpr(host.ADAM.index("beta1_to_1"))
ADAM_BETA2 = tl.constexpr(host.ADAM.index("beta2"))
ADAM_BETA2_TO_1 = tl.constexpr(host.ADAM.index("beta2_to_1"))
ADAM_EPS = tl.constexpr(host.ADAM.index("eps"))
ADAM_AMSGRAD = tl.constexpr(host.ADAM.index("amsgrad"))
OF_ADAM = tl.constexpr(len(host.ADAM))


@triton.jit(do_not_specialize=["rows"])
def sgd(
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
    MOMENTUM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``params ←`` θ after a step of SGD along d. The option of a leaf: whether it is its first step. ``MOMENTUM``:
    whether any leaf has a buffer."""
    leaf, begin, length = piece_of(pieces)
    row = table + leaf * WIDTH
    group = numbers + tl.load(row + GROUP) * (OF_SGD + OF_TERM * TERMS)
    kappa, scale = kappa_and_scale(products, clipping, rows, PROJECT, CLIP, ROWS)
    whole = whole_blocks(row, length, BLOCK)
    for CODE in tl.static_range(CODES):
        if AMONG & (1 << CODE):
            if has_types(row, CODE, AMONG):
                _sgd(
                    table, row, begin, 0, whole, group, kappa, scale, CODE, TERMS, PARTLY, MOMENTUM, BLOCK, False, False
                )
                _sgd(
                    table, row, begin, whole, length, group, kappa, scale, CODE,
                    TERMS, PARTLY, MOMENTUM, BLOCK, True, STRIDED,
                )  # fmt: skip


@triton.jit
def _sgd(
    table,
    row,
    begin,
    start,
    stop,
    group,
    kappa,
    scale,
    CODE: tl.constexpr,
    TERMS: tl.constexpr,
    PARTLY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
):
    TYPE: tl.constexpr = PARAMETER[CODE]
    WORK: tl.constexpr = WORKING[CODE]
    terms = group + OF_SGD
    f1, f2, f3 = factors_of(terms, kappa, scale, TERMS, WORK)
    lr = tl.load(group + SGD_LR).to(WORK)
    sign = tl.load(group + SGD_SIGN).to(WORK)
    weight_decay = tl.load(group + SGD_DECAY).to(WORK)
    params = array(row, PARAMS, begin, TYPE, MASKED, STRIDED)
    theta = array(row, THETA, begin, TYPE, MASKED, STRIDED)
    first, second, third = arrays_of(row, SGD_TERM, begin, TERMS, TYPE, MASKED, STRIDED)
    if MOMENTUM:
        has_buffer = tl.load(row + (HEADER + BUFFER)) != 0
        is_first = tl.load(row + OPTION) != 0
        momentum = tl.load(group + SGD_MOMENTUM).to(WORK)
        of_direction = tl.where(is_first, 1.0, tl.load(group + SGD_UNDAMPED)).to(WORK)
        nesterov = flag(group + SGD_NESTEROV)
        buffer = array(row, BUFFER, begin, TYPE, MASKED, STRIDED)
    for at in range(start, stop, BLOCK):
        index = indices(begin, at, BLOCK, STRIDED)
        inside = inside_of(at, stop, BLOCK)
        x, y, z = read_terms(
            table, row, first, second, third, terms, index, inside, SGD_TERM, TERMS, WORK, PARTLY, MASKED, STRIDED
        )
        origin = read(theta, place(table, row, THETA, index, STRIDED), inside, MASKED).to(WORK)
        d = sgd_gradient(combine(x, y, z, f1, f2, f3, terms, TERMS, PARTLY), origin, sign, weight_decay)
        if MOMENTUM:
            of_buffer = place(table, row, BUFFER, index, STRIDED)
            b = read_some(buffer, of_buffer, inside, has_buffer & (is_first == 0), MASKED).to(WORK)
            b = sgd_buffer(d, b, momentum, of_direction)
            write_some(buffer, of_buffer, b, inside, has_buffer, MASKED)
            d = tl.where(has_buffer, tl.where(nesterov, tl.fma(momentum, b, d), b), d)
        write(params, place(table, row, PARAMS, index, STRIDED), tl.fma(-lr, d, origin), inside, MASKED)


@triton.jit(do_not_specialize=["rows"])
def adam(
    pieces,
    table,
    numbers,
    products,
    clipping,
    corrections,
    rows,
    AMONG: tl.constexpr,
    STRIDED: tl.constexpr,
    TERMS: tl.constexpr,
    PARTLY: tl.constexpr,
    PROJECT: tl.constexpr,
    CLIP: tl.constexpr,
    ROWS: tl.constexpr,
    AMSGRAD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``params ←`` θ after a step of Adam or AdamW along d. The option of a leaf: which of ``corrections`` (the size of
    the step, and the root of the correction of the squares). ``AMSGRAD``: whether any group has it."""
    leaf, begin, length = piece_of(pieces)
    row = table + leaf * WIDTH
    group = numbers + tl.load(row + GROUP) * (OF_ADAM + OF_TERM * TERMS)
    correction = corrections + 2 * tl.load(row + OPTION)
    kappa, scale = kappa_and_scale(products, clipping, rows, PROJECT, CLIP, ROWS)
    whole = whole_blocks(row, length, BLOCK)
    for CODE in tl.static_range(CODES):
        if AMONG & (1 << CODE):
            if has_types(row, CODE, AMONG):
                _adam(
                    table, row, begin, 0, whole, group, correction, kappa, scale, CODE,
                    TERMS, PARTLY, AMSGRAD, BLOCK, False, False,
                )  # fmt: skip
                _adam(
                    table, row, begin, whole, length, group, correction, kappa, scale, CODE,
                    TERMS, PARTLY, AMSGRAD, BLOCK, True, STRIDED,
                )  # fmt: skip


@triton.jit
def _adam(
    table,
    row,
    begin,
    start,
    stop,
    group,
    correction,
    kappa,
    scale,
    CODE: tl.constexpr,
    TERMS: tl.constexpr,
    PARTLY: tl.constexpr,
    AMSGRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    STRIDED: tl.constexpr,
):
    TYPE: tl.constexpr = PARAMETER[CODE]
    WORK: tl.constexpr = WORKING[CODE]
    terms = group + OF_ADAM
    f1, f2, f3 = factors_of(terms, kappa, scale, TERMS, WORK)
    sign = tl.load(group + ADAM_SIGN).to(WORK)
    weight_decay = tl.load(group + ADAM_DECAY).to(WORK)
    shrink = tl.load(group + ADAM_SHRINK).to(WORK)
    beta1_to_1 = tl.load(group + ADAM_BETA1_TO_1)
    beta2 = tl.load(group + ADAM_BETA2).to(WORK)
    beta2_to_1 = tl.load(group + ADAM_BETA2_TO_1).to(WORK)
    eps = tl.load(group + ADAM_EPS).to(WORK)
    step_size = tl.load(correction).to(WORK)
    root_correction = tl.load(correction + 1).to(WORK)
    params = array(row, PARAMS, begin, TYPE, MASKED, STRIDED)
    theta = array(row, THETA, begin, TYPE, MASKED, STRIDED)
    average = array(row, AVERAGE, begin, TYPE, MASKED, STRIDED)
    square = array(row, SQUARE, begin, TYPE, MASKED, STRIDED)
    first, second, third = arrays_of(row, ADAM_TERM, begin, TERMS, TYPE, MASKED, STRIDED)
    if AMSGRAD:
        amsgrad = flag(group + ADAM_AMSGRAD)
        largest = array(row, LARGEST, begin, TYPE, MASKED, STRIDED)
    for at in range(start, stop, BLOCK):
        index = indices(begin, at, BLOCK, STRIDED)
        inside = inside_of(at, stop, BLOCK)
        x, y, z = read_terms(
            table, row, first, second, third, terms, index, inside, ADAM_TERM, TERMS, WORK, PARTLY, MASKED, STRIDED
        )
        origin = read(theta, place(table, row, THETA, index, STRIDED), inside, MASKED).to(WORK)
        of_average = place(table, row, AVERAGE, index, STRIDED)
        of_square = place(table, row, SQUARE, index, STRIDED)
        m = read(average, of_average, inside, MASKED).to(WORK)
        v = read(square, of_square, inside, MASKED).to(WORK)
        if AMSGRAD:
            of_largest = place(table, row, LARGEST, index, STRIDED)
            top = read_some(largest, of_largest, inside, amsgrad, MASKED).to(WORK)
        d = sgd_gradient(combine(x, y, z, f1, f2, f3, terms, TERMS, PARTLY), origin, sign, weight_decay)
        m = adam_average(d, m, beta1_to_1)
        v = adam_square(d, v, beta2, beta2_to_1)
        write(average, of_average, m, inside, MASKED)
        write(square, of_square, v, inside, MASKED)
        if AMSGRAD:
            top = tl.where(amsgrad, tl.where(top >= v, top, v), v)
            write_some(largest, of_largest, top, inside, amsgrad, MASKED)
            v = top
        moved = adam_moved(origin * shrink, m, v, step_size, root_correction, eps)
        write(params, place(table, row, PARAMS, index, STRIDED), moved, inside, MASKED)
