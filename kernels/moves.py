"""The primitive that moves parameters.

All inputs of a block are read before anything is written. So an input may be the same array as an output, but must not
overlap it otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as host
from .elements import GROUP, array, load, piece_of, read, working, write
from .formulas import folded, inverse_norm, perturbed, weigh

# The lists of perturb. B, INTO and OTHER may be missing, and BACKUP if it is not needed.
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
MULTIPLE = tl.constexpr(host.PERTURB.index("multiple"))
OF_PERTURB = tl.constexpr(len(host.PERTURB))


@triton.jit(do_not_specialize=["stride", "ticket"])
def perturb(
    pieces,
    table,
    numbers,
    square,
    stride,
    mark,
    ticket,
    TYPE: tl.constexpr,
    DIFFERENCE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SAVE: tl.constexpr,
    FROM_START: tl.constexpr,
    FOLDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``params ← origin + (radius / (√square + ξ) + multiple) T² (a − b)``.

    With ``SAVE``, first copy the parameters to the backup, and leave a ticket. With ``FOLDED``, then fold. The origin
    is the backup with ``FROM_START``, and the parameters otherwise. There is one square, or one per group with a stride
    of 1.
    """
    row, begin, whole, length = piece_of(pieces, table, WIDTH, BLOCK)
    place = tl.load(row + GROUP)
    group = numbers + place * OF_PERTURB
    factor = inverse_norm(tl.load(square + place * stride)) * tl.load(group + RADIUS) + tl.load(group + MULTIPLE)
    eta = tl.load(group + ETA)
    k = tl.load(group + K)
    l = tl.load(group + L)  # noqa: E741
    if SAVE:
        tl.store(mark, ticket, mask=tl.program_id(0) == 0)
    for MASKED in tl.static_range(2):
        params = array(row, PARAMS, begin, TYPE, MASKED)
        backup = array(row, BACKUP, begin, TYPE, MASKED)
        a = array(row, A, begin, TYPE, MASKED)
        b = array(row, B, begin, TYPE, MASKED)
        if FOLDED:
            into = array(row, INTO, begin, TYPE, MASKED)
            other = array(row, OTHER, begin, TYPE, MASKED)
        for at in range(whole if MASKED else 0, length if MASKED else whole, BLOCK):
            index = at + tl.arange(0, BLOCK)
            stored = load(backup if FROM_START and not SAVE else params, index, length, MASKED)
            origin = working(stored)
            v = read(a, index, length, MASKED)
            if DIFFERENCE:
                v -= read(b, index, length, MASKED)
            if WEIGHTED:
                theta = origin
                if not (SAVE or FROM_START):  # θ is not the origin, so it must be read
                    theta = read(backup, index, length, MASKED)
                v = weigh(weigh(v, theta, eta), theta, eta)
            # The fold may overwrite a or b, so all threads read everything before any of them writes.
            if FOLDED:
                x = read(into, index, length, MASKED)
                y = read(other, index, length, MASKED)
                tl.debug_barrier()
            if SAVE:
                write(backup, index, stored, length, MASKED)
            write(params, index, perturbed(origin, v, factor), length, MASKED)
            if FOLDED:
                write(into, index, folded(x, y, k, l), length, MASKED)
