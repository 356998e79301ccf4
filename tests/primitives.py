"""The table of primitives: cases, their formulas in fp64, and what it takes for two results to be the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch
from cases import INTERPRETED, pairwise

from gam_fast.backends import base

LENGTHS = (1, 3, 4, 5, 7, 33, 255, 256, 1023, 1024, 1025, 8191, 8192, 8193, 16_385)
if INTERPRETED:  # which takes milliseconds for each block of 1,024
    LENGTHS = (1, 7, 1023, 1025, 8193)
SHAPES = [(3, 5), (), (0,), (5, 401), (2, 8, 4, 4), *((n,) for n in LENGTHS)]
"""Lengths around vectors, blocks and chunks of kernels; every fourth is not aligned, the fifth is channels last."""

ETA = [0.0, 0.1, 0.2]
PAD = 64
GUARD = 9.0


@cache
def _values(seed):
    return torch.randn(65_537, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@lru_cache(8)
def _places(sizes, shifts):
    """Where tensors of these sizes begin in a room that they share, all their elements, and the room's size."""
    begins, end = [], PAD
    for size, shift in zip(sizes, shifts, strict=True):
        begins.append(end + shift)
        end = (begins[-1] + size + 2 * PAD) // PAD * PAD
    inside = torch.cat([torch.arange(b, b + size) for b, size in zip(begins, sizes, strict=True)])
    return begins, inside, end


class Lists:
    """Lists of tensors by their seed, of parameters that take turns in being of each group.

    The tensors of a list lie apart, so that a write beyond one is seen. ``stored_as`` is the dtype of the tensors where
    it is not the one that their values are rounded to; ``shifted`` aligns none of them.
    """

    def __init__(self, dtype, shapes=SHAPES, device="cpu", *, groups=3, stored_as=None, shifted=False):
        self.dtype, self.device, self.stored_as = dtype, device, stored_as or dtype
        self.groups, self.shifted = groups, shifted
        like = [torch.empty(shape, device="meta") for shape in shapes]
        self.like = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in like]
        self.sizes = tuple(t.numel() for t in like)
        self.rooms = []

    def __call__(self, seed):
        shifts = tuple(1 + seed % 3 if self.shifted or i % 4 == 3 else 0 for i in range(len(self.like)))
        begins, inside, end = _places(self.sizes, shifts)
        room = torch.full((end,), GUARD, dtype=self.stored_as)
        values = _values(seed).to(self.dtype).to(self.stored_as)
        room[inside] = values.repeat(len(inside) // len(values) + 1)[: len(inside)]
        room = room.to(self.device)
        self.rooms.append((room, inside))
        return [room.as_strided(t.size(), t.stride(), begin) for t, begin in zip(self.like, begins, strict=True)]

    def are_written_inside_only(self):
        return all(bool((room.cpu().index_fill(0, inside, GUARD) == GUARD).all()) for room, inside in self.rooms)

    def block(self, saved=True):
        params = self(1)
        return base.Block(params, [i % self.groups for i in range(len(params))], self(2), saved)

    def by_group(self, *values):
        """One value a group, from three."""
        return [values[g % 3] for g in range(self.groups)]


def decayed(d, w, decay, maximize):
    """±d + λ θ; an infinite θ without decay makes no NaN."""
    d = -d if maximize else d
    return d + decay * w if decay else d


class Formulas:
    """A backend by the formulas of :mod:`gam_fast.backends.base`, for tensors of fp64."""

    @staticmethod
    def _weighted(block, a, b, eta, power):
        theta = block.backup if block.saved else block.params
        for i, (w, g) in enumerate(zip(theta, block.group, strict=True)):
            v = a[i] if b is None else a[i] - b[i]
            yield v if eta is None else (w.abs() + eta[g]) ** power * v

    @staticmethod
    def _combined(terms, factors):
        for i, by_term in enumerate(factors):
            used = [c * terms[t][i] for t, c in enumerate(by_term) if c != 0.0]
            yield sum(used) if used else torch.zeros_like(terms[0][i])

    def _direction(self, block, d):
        kappa, scale, square = 0.0, 1.0, 0.0
        if d.q is not None:
            kappa = sum(um for _, um, _ in d.products) / sum(uu for uu, _, _ in d.products)
        if d.limit is not None:
            for (uu, um, mm), g in zip(d.products, d.gamma, strict=True):
                g = g if d.q is not None else 0.0
                square += (1 + kappa * g) ** 2 * uu - 2 * (1 + kappa * g) * g * um + g * g * mm
            scale = min(1.0, d.limit / (math.sqrt(square) + 1e-6))
        q = d.q or [[0.0] * len(d.p[0])] * len(d.p)
        factors = [[scale * (x[g] + kappa * y[g]) for x, y in zip(d.p, q, strict=True)] for g in block.group]
        return list(self._combined(d.terms, factors))

    def square_norm(self, block, a, b=None, eta=None):
        return torch.stack([(v * v).sum() for v in self._weighted(block, a, b, eta, 1)]).sum()

    def perturb(self, block, a, b, radius, square, *, from_start, eta=None, fold=None, multiple=None):
        if not block.saved:
            block.backup, block.saved = [p.clone() for p in block.params], True
        moves = list(self._weighted(block, a, b, eta, 2))
        for i, (g, move) in enumerate(zip(block.group, moves, strict=True)):
            origin = block.backup[i] if from_start else block.params[i]
            own = square[g] if isinstance(square, torch.Tensor) and square.numel() > 1 else square
            factor = radius[g] / (math.sqrt(own) + 1e-12) + (multiple[g] if multiple else 0.0)
            block.params[i].copy_(origin + factor * move)
            if fold is not None:
                fold.into[i].copy_(fold.k[g] * fold.into[i] + fold.l[g] * fold.other[i])

    def inner_products(self, block, u, m, groups):
        found = torch.zeros(groups, 3, dtype=torch.float64)
        of_u, of_m = (
            self._combined(u.terms, [[row[g] for row in d.p] if d else [] for g in block.group]) for d in (u, m)
        )
        for g, x, y in zip(block.group, of_u, of_m, strict=True):
            found[g] += torch.stack([(x * x).sum(), (x * y).sum(), (y * y).sum()])
        return found

    def restore(self, block):
        for param, theta in zip(block.params, block.backup if block.saved else (), strict=block.saved):
            param.copy_(theta)

    def direction(self, block, d, out):
        for value, into in zip(self._direction(block, d), out, strict=True):
            into.copy_(value)
        self.restore(block)

    def update(self, block, d, formula, state, groups, options, option):
        self.restore(block)
        for i, (w, v) in enumerate(zip(block.params, self._direction(block, d), strict=True)):
            kept = [values[i] for values in state]
            getattr(self, formula)(w, v, *kept, *groups[block.group[i]], *options[option[i]])

    @staticmethod
    def sgd(w, d, b, lr, momentum, dampening, decay, nesterov, maximize, first):
        d = decayed(d, w, decay, maximize)
        step = d
        if b is not None:
            b.copy_(d if first else momentum * b + (1 - dampening) * d)
            step = d + momentum * b if nesterov else b
        w.sub_(lr * step)

    @staticmethod
    def adam(w, d, m, v, largest, beta1, beta2, eps, decay, shrink, maximize, step_size, root_correction):
        d = decayed(d, w, decay, maximize)
        m.add_((1 - beta1) * (d - m))
        v.copy_(beta2 * v + (1 - beta2) * d * d)
        top = v if largest is None else largest.copy_(torch.maximum(largest, v))
        w.copy_(shrink * w - step_size * m / (top.sqrt() / root_correction + eps))

    @staticmethod
    def lion(w, d, m, lr, beta1, beta2, decay, shrink, maximize):
        d = decayed(d, w, decay, maximize)
        w.copy_(shrink * w - lr * torch.sign(m + (1 - beta1) * (d - m)))
        m.add_((1 - beta2) * (d - m))


class Place(NamedTuple):
    """Where a case runs: a backend, a device, and whether it gets sums as an accelerator has them."""

    backend: Any
    device: str = "cpu"
    takes_tensors: bool = False

    def sums(self, value):
        return torch.tensor(value, dtype=torch.float64, device=self.device) if self.takes_tensors else value


class Found(NamedTuple):
    """``rounded`` are of the size of ``scale`` before they are stored, ``exact`` are copies."""

    rounded: list[torch.Tensor]
    exact: list[torch.Tensor] = []  # noqa: RUF012
    scale: float = 8.0


def square_norm(place, lists, difference, weighted, saved):
    b, eta = lists(4) if difference else None, lists.by_group(*ETA) if weighted else None
    return Found([place.backend.square_norm(lists.block(saved), lists(3), b, eta)])


def perturb(place, lists, difference, weighted, folds, saved, from_start, multiple, by_group):
    """With ``by_group`` there is one square per group, and of one group no parameter is here."""
    block, b, eta = lists.block(saved), lists(4) if difference else None, lists.by_group(*ETA) if weighted else None
    k, l = lists.by_group(0.5, 2.0, 1.0), lists.by_group(-1.0, 0.25, 0.5)  # noqa: E741
    fold = base.FoldInto(lists(5), lists(6), k, l) if folds else None
    radius, square = lists.by_group(0.5, -0.25, 1.0), place.sums(7.0)
    if by_group:
        square = torch.tensor([*lists.by_group(7.0, 0.5, 3.0), 0.25], dtype=torch.float64, device=place.device)
    more = {"multiple": lists.by_group(-0.25, 0.5, 0.0)} if multiple else {}
    place.backend.perturb(block, lists(3), b, radius, square, from_start=from_start, eta=eta, fold=fold, **more)
    assert block.saved
    moved = [p.clone() for p in block.params]
    place.backend.restore(block)
    return Found([*moved, *(fold.into if fold else ())], [*block.params, *block.backup])


def direction_of(place, lists, terms, projected, clipped):
    """Every third group uses no term without the projection; of the last row of products no parameter is here."""
    p = [lists.by_group(0.5 + t, -0.25 * t, 0.0) for t in range(terms)]
    q = [lists.by_group(0.1 * t, 0.3, -0.2) for t in range(terms)] if projected else None
    products = place.sums([*lists.by_group([6.0, 5.0, 7.0], [4.0, 2.0, 3.0], [1.0, 0.5, 2.0]), [0.5, 0.25, 1.0]])
    gamma, limit = [*lists.by_group(0.1, 0.4, 0.2), 0.3], 0.9 if clipped else None
    d = base.Direction([lists(10 + t) for t in range(terms)], p, q, products, gamma, limit)
    if terms > 1 and not projected and not clipped:
        for i, unused in enumerate(d.terms[0]):
            if i % lists.groups % 3 == 1:  # its factor is 0: it must not be read
                unused.fill_(math.nan)
    return d


def inner_products(place, lists, terms, with_m):
    u = direction_of(place, lists, terms, False, False)
    m = base.Direction(u.terms, [lists.by_group(-1.0, 0.5 * t, 0.0) for t in range(terms)]) if with_m else None
    return Found([place.backend.inner_products(lists.block(), u, m, lists.groups + 1)])


def direction(place, lists, form, saved, in_place):
    block, d = lists.block(saved), direction_of(place, lists, *form)
    out = d.terms[-1] if in_place else lists(7)
    place.backend.direction(block, d, out)
    return Found(out, [*block.params, *block.backup])


def update(place, lists, formula, form, saved, groups, options, lacks, scale=8.0):
    """``lacks`` has for each list of state the groups, of three, that do without."""
    block, d = lists.block(saved), direction_of(place, lists, *form)
    option = [i % len(options) for i in range(len(block.params))]
    state = []
    for k, absent in enumerate(lacks):
        values = [value if k == 0 else value.abs_() for value in lists(20 + k)]
        state.append([None if g % 3 in absent else value for value, g in zip(values, block.group, strict=True)])
    for value, o in zip(state[0], option, strict=True):
        if formula == "sgd" and value is not None and o:  # its first step
            value.zero_()
    place.backend.update(block, d, formula, state, lists.by_group(*groups), options, option)
    kept = [value for values in state for value in values if value is not None]
    return Found([*block.params, *kept], block.backup, scale)


BOTH = [False, True]
FORMS = {
    "plain": (2, False, False),
    "projected": (1, True, False),
    "clipped": (2, False, True),
    "all": (3, True, True),
}
SGD_ROWS = [(0.1, 0.9, 0.25, 0.01, 0.0, 0.0), (0.2, 0.5, 0.0, 0.0, 1.0, 1.0), (0.3, 0.0, 0.0, 0.02, 0.0, 0.0)]
ADAM_ROWS = [
    (0.9, 0.99, 1e-3, 0.0, 0.999, 0.0),
    (0.8, 0.95, 1e-2, 0.02, 1.0, 1.0),
    (0.7, 0.9, 1e-1, 0.01, 0.9, 0.0),
]
LION_ROWS = [(0.1, 0.9, 0.99, 0.0, 0.75, 0.0), (0.2, 0.3, 0.4, 0.125, 1.0, 1.0), (0.3, 0.5, 0.5, 0.0, 1.0, 0.0)]
ADAM_OPTIONS = [(0.1 / (1 - 0.9**t), math.sqrt(1 - 0.99**t)) for t in range(1, 6)]
SGD = {"formula": "sgd", "groups": SGD_ROWS, "options": [(0.0,), (1.0,)]}
ADAM = {"formula": "adam", "groups": ADAM_ROWS, "options": ADAM_OPTIONS, "scale": 64.0}
LION = {"formula": "lion", "groups": LION_ROWS, "options": [()]}
UPDATES = {
    "sgd": {**SGD, "form": FORMS["all"], "saved": True, "lacks": [[2]]},
    "sgd-unsaved": {**SGD, "form": FORMS["plain"], "saved": False, "lacks": [[]]},
    "sgd-without_state": {
        **SGD,
        "groups": [(0.1, 0.0, 0.0, 0.01, 0.0, maximize) for maximize in (0.0, 1.0, 0.0)],
        "form": FORMS["clipped"],
        "saved": True,
        "lacks": [[0, 1, 2]],
    },
    "adam": {**ADAM, "form": FORMS["projected"], "saved": True, "lacks": [[], [], [0, 1, 2]]},
    "adam-amsgrad": {**ADAM, "form": FORMS["all"], "saved": True, "lacks": [[], [], [0]]},
    "lion": {**LION, "form": FORMS["all"], "saved": True, "lacks": [[]]},
}


def _by_flags(primitive, *flags):
    """The primitive with any two flags on or off, by what is on."""
    return {
        "-".join([primitive.__name__, *(flag for flag, on in zip(flags, row, strict=True) if on)]): partial(
            primitive, **dict(zip(flags, row, strict=True))
        )
        for row in pairwise(*[BOTH] * len(flags))
    }


CASES: dict[str, Callable[[Place, Lists], Found]] = {
    **_by_flags(square_norm, "difference", "weighted", "saved"),
    **_by_flags(perturb, "difference", "weighted", "folds", "saved", "from_start", "multiple", "by_group"),
    **{
        f"inner_products-of_{terms}{'-with_m' * with_m}": partial(inner_products, terms=terms, with_m=with_m)
        for terms in (1, 2, 3)
        for with_m in BOTH
    },
    **{
        f"direction-{form}{'-saved' * saved}{'-in_place' * in_place}": partial(
            direction, form=FORMS[form], saved=saved, in_place=in_place
        )
        for form, saved, in_place in pairwise(FORMS, BOTH, BOTH)
    },
    **{f"update-{name}": partial(update, **options) for name, options in UPDATES.items()},
}

SUMS = ("square_norm", "inner_products")
"""Primitives whose results depend on the order of additions."""


def run_all(backend, dtype, shapes):
    """All that the cases make of the same input, by name, on a backend that takes sums as tensors where it can."""
    place, found = Place(backend, takes_tensors=type(backend).__name__ != "NativeBackend"), {}
    for name, case in CASES.items():
        rounded, exact, _ = case(place, Lists(dtype, shapes))
        found[name] = [*rounded, *exact]
    return found


def same_bits(a, b):
    """Equal to the last bit, NaN included; zeros of either sign are equal."""
    return all(
        torch.equal(torch.nan_to_num(x.cpu(), nan=7.0), torch.nan_to_num(y.cpu(), nan=7.0))
        for x, y in zip(a, b, strict=True)
    )


def assert_close(found, expected, dtype, scale):
    """Within the rounding of one store, and of a few operations in the working precision at the operands' size."""
    working = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for a, e in zip(found, expected, strict=True):
        if e.numel():
            size = float(e.abs().max()) + scale
            error = (a.cpu().double() - e).abs()
            assert bool((error <= 0.5 * torch.finfo(a.dtype).eps * e.abs() + 32 * working * size).all()), error.max()
