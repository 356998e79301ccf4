"""The combination Σ factor X of terms, whose factors may depend on sums in device memory.

The numbers of a group end with three for each term: p, q, and whether the group uses the term (1 or 0). An unused term
is not read, because its elements are arbitrary. ``PARTLY`` is a bit mask of the terms that some group does not use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import table as host
from .elements import flag
from .formulas import clip_factor, ratio, square_of_direction

P = tl.constexpr(host.TERM.index("p"))
Q = tl.constexpr(host.TERM.index("q"))
USED = tl.constexpr(host.TERM.index("used"))
OF_TERM = tl.constexpr(len(host.TERM))


@triton.jit
def kappa_and_scale(products, clipping, rows, PROJECT: tl.constexpr, CLIP: tl.constexpr, ROWS: tl.constexpr):
    """Return κ and s of a direction: 0 without ``PROJECT``, and 1 without ``CLIP``.

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
def factors_of(terms, kappa, scale, TERMS: tl.constexpr):
    """Return ``s (p + κ q)`` of each term."""
    found = ()
    for t in tl.static_range(TERMS):
        found += (scale * (kappa * tl.load(terms + (OF_TERM * t + Q)) + tl.load(terms + (OF_TERM * t + P))),)
    return found


@triton.jit
def used_of(terms, TERMS: tl.constexpr):
    """Return whether the group uses each term."""
    found = ()
    for t in tl.static_range(TERMS):
        found += (flag(terms + (OF_TERM * t + USED)),)
    return found


@triton.jit
def combine(x, factors, used, TERMS: tl.constexpr, PARTLY: tl.constexpr):
    """Return ``Σ factor x`` of the terms that the group uses."""
    total = factors[0].to(x[0].dtype) * x[0]
    for t in tl.static_range(1, TERMS):
        more = tl.fma(factors[t].to(total.dtype), x[t], total)
        if PARTLY & (1 << t):
            total = tl.where(used[t], more, total)
        else:
            total = more
    return total
