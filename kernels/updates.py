"""The steps of the base optimizers. Of a block everything is read before anything is written.

Options are numbers of a group: 0 and 1, or the sign 1 and −1. What a leaf or a group has no use for is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as host
from .combine import OF_TERM, combine, factors_of, kappa_and_scale, read_terms, used_of
from .elements import GROUP, HEADER, OPTION, array, arrays, flag, piece_of, read, read_if, working, write, write_if
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
    TYPE: tl.constexpr,
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
    row, begin, whole, length = piece_of(pieces, table, WIDTH, BLOCK)
    group = numbers + tl.load(row + GROUP) * (OF_SGD + OF_TERM * TERMS)
    kappa, scale = kappa_and_scale(products, clipping, rows, PROJECT, CLIP, ROWS)
    used = used_of(group + OF_SGD, TERMS)
    factors = factors_of(group + OF_SGD, kappa, scale, TERMS)
    work = working(tl.zeros((1,), TYPE)).dtype
    lr = tl.load(group + SGD_LR).to(work)
    sign = tl.load(group + SGD_SIGN).to(work)
    weight_decay = tl.load(group + SGD_DECAY).to(work)
    momentum = tl.load(group + SGD_MOMENTUM).to(work)
    nesterov = flag(group + SGD_NESTEROV)
    has_buffer = tl.load(row + (HEADER + BUFFER)) != 0
    is_first = tl.load(row + OPTION) != 0
    of_direction = tl.where(is_first, 1.0, tl.load(group + SGD_UNDAMPED)).to(work)
    for MASKED in tl.static_range(2):
        params = array(row, PARAMS, begin, TYPE, MASKED)
        theta = array(row, THETA, begin, TYPE, MASKED)
        buffer = array(row, BUFFER, begin, TYPE, MASKED)
        pointers = arrays(row, SGD_TERM, TERMS, begin, TYPE, MASKED)
        for at in range(whole if MASKED else 0, length if MASKED else whole, BLOCK):
            index = at + tl.arange(0, BLOCK)
            x = read_terms(pointers, used, index, length, TERMS, PARTLY, MASKED)
            origin = read(theta, index, length, MASKED)
            d = sgd_gradient(combine(x, factors, used, TERMS, PARTLY), origin, sign, weight_decay)
            if MOMENTUM:
                b = read_if(buffer, index, length, has_buffer & (is_first == 0), MASKED)
                b = sgd_buffer(d, b, momentum, of_direction)
                write_if(buffer, index, b, length, has_buffer, MASKED)
                d = tl.where(has_buffer, tl.where(nesterov, tl.fma(momentum, b, d), b), d)
            write(params, index, tl.fma(-lr, d, origin), length, MASKED)


@triton.jit(do_not_specialize=["rows"])
def adam(
    pieces,
    table,
    numbers,
    products,
    clipping,
    corrections,
    rows,
    TYPE: tl.constexpr,
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
    row, begin, whole, length = piece_of(pieces, table, WIDTH, BLOCK)
    group = numbers + tl.load(row + GROUP) * (OF_ADAM + OF_TERM * TERMS)
    correction = corrections + 2 * tl.load(row + OPTION)
    kappa, scale = kappa_and_scale(products, clipping, rows, PROJECT, CLIP, ROWS)
    used = used_of(group + OF_ADAM, TERMS)
    factors = factors_of(group + OF_ADAM, kappa, scale, TERMS)
    work = working(tl.zeros((1,), TYPE)).dtype
    sign = tl.load(group + ADAM_SIGN).to(work)
    weight_decay = tl.load(group + ADAM_DECAY).to(work)
    shrink = tl.load(group + ADAM_SHRINK).to(work)
    beta1_to_1 = tl.load(group + ADAM_BETA1_TO_1)
    beta2 = tl.load(group + ADAM_BETA2).to(work)
    beta2_to_1 = tl.load(group + ADAM_BETA2_TO_1).to(work)
    eps = tl.load(group + ADAM_EPS).to(work)
    amsgrad = flag(group + ADAM_AMSGRAD)
    step_size = tl.load(correction).to(work)
    root_correction = tl.load(correction + 1).to(work)
    for MASKED in tl.static_range(2):
        params = array(row, PARAMS, begin, TYPE, MASKED)
        theta = array(row, THETA, begin, TYPE, MASKED)
        average = array(row, AVERAGE, begin, TYPE, MASKED)
        square = array(row, SQUARE, begin, TYPE, MASKED)
        largest = array(row, LARGEST, begin, TYPE, MASKED)
        pointers = arrays(row, ADAM_TERM, TERMS, begin, TYPE, MASKED)
        for at in range(whole if MASKED else 0, length if MASKED else whole, BLOCK):
            index = at + tl.arange(0, BLOCK)
            x = read_terms(pointers, used, index, length, TERMS, PARTLY, MASKED)
            origin = read(theta, index, length, MASKED)
            m = read(average, index, length, MASKED)
            v = read(square, index, length, MASKED)
            if AMSGRAD:
                top = read_if(largest, index, length, amsgrad, MASKED)
            d = sgd_gradient(combine(x, factors, used, TERMS, PARTLY), origin, sign, weight_decay)
            m = adam_average(d, m, beta1_to_1)
            v = adam_square(d, v, beta2, beta2_to_1)
            write(average, index, m, length, MASKED)
            write(square, index, v, length, MASKED)
            if AMSGRAD:
                top = tl.where(amsgrad, tl.where(top >= v, top, v), v)
                write_if(largest, index, top, length, amsgrad, MASKED)
                v = top
            moved = adam_moved(origin * shrink, m, v, step_size, root_correction, eps)
            write(params, index, moved, length, MASKED)
