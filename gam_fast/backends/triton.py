"""The primitives as Triton kernels, on NVIDIA and AMD GPUs: one launch each for any number of tensors, and a second, of
one program a group, where sums are added up.

Formulas, order and rounding are those of the compiled core: the same bits, but for sums. As there, nothing waits for
the device; kernels read norms and products where they lie. What the core does in C++ before a launch is done in Python
here, which takes the processor longer, not the GPU.

On CPU tensors the kernels run in Triton's interpreter, where ``TRITON_INTERPRET=1`` was set before Triton was imported:
thousands of times slower, to test them.

Importing this module raises ``ImportError``, with the reason, where there is no Triton, or one that is too old. Triton
itself is imported when a tensor needs it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from functools import cache
from importlib import util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..kernels.table import SUMS
from . import scalars
from .base import AdamGroup, Direction, FoldInto, Leaves, PerGroup, Scalar, SGDGroup, TensorList, takes_state
from .eager import EagerBackend
from .launches import OF_SUMS, after, guard, launch, launch_totals
from .tables import Argument, Prepared, Tables
from .terms import Terms, terms_of
from .tuning import Configuration, configuration_of

if util.find_spec("triton") is None:
    raise ImportError("Triton is not installed: pip install triton on Linux, or a build of torch for CUDA or ROCm")

OLDEST = (3, 4)
"""The first release of Triton that compiles the kernels."""

MAX_FOLDS = 2

MAX_PLANS = 4
"""Sets of leaves whose tables an optimizer keeps on each device."""


def interprets() -> bool:
    """Whether this process is one of Triton's interpreter, which works on CPU tensors only."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _kernels() -> tuple[ModuleType, ModuleType, ModuleType]:
    from ..kernels import moves, sums, updates

    return sums, moves, updates


@cache
def _why_unusable() -> str | None:
    """Why Triton, once imported, is of no use."""
    try:
        import triton

        version: str = triton.__version__
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            return f"Triton {version} is too old: {'.'.join(map(str, OLDEST))} or newer is needed"
        _kernels()
    except Exception as error:  # a Triton that does not fit this torch or Python fails in many ways
        return f"Triton cannot be imported: {type(error).__name__}: {error}"
    return None


class TritonBackend:
    """See :class:`gam_fast.backends.base.Backend` for what each primitive computes.

    Args:
        shape: that of the programs which move and update; chosen for the device if it is not given.
    """

    name = "triton"

    def __init__(self, shape: Configuration | None = None) -> None:
        self._plans: list[Tables] = []  # the last one used first
        self._shape = shape
        self._mark: Tensor | None = None
        self._launches_that_save = 0

    @staticmethod
    def describe() -> str:
        import triton

        where = "in its interpreter on CPU tensors" if interprets() else "on tensors of NVIDIA and AMD GPUs"
        return f"Triton {triton.__version__}, {where}"

    @staticmethod
    def refusal(device: torch.device) -> str | None:
        if interprets():
            if device.type != "cpu":
                return "TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors only"
        elif device.type != "cuda":
            also = "; with TRITON_INTERPRET=1 in the environment on CPU tensors, slowly" if device.type == "cpu" else ""
            return f"the Triton kernels run on tensors of NVIDIA and AMD GPUs{also}"
        return _why_unusable()

    def _tables_for(self, leaves: Leaves) -> Tables:
        """The tables of a step before where they fit; looked at once a step, and when leaves were added."""
        tables = leaves.cache.get("tables")
        if isinstance(tables, Tables) and leaves.cache.get("tables_count") == len(leaves.params):
            return tables
        found = next((tables for tables in self._plans if tables.fits(leaves)), None) or Tables(leaves)
        self._plans = [found, *(tables for tables in self._plans if tables is not found)][:MAX_PLANS]
        leaves.cache.update(tables=found, tables_count=len(leaves.params))
        return found

    def _shape_on(self, device: torch.device) -> Configuration:
        if self._shape is None:
            self._shape = configuration_of(device, _seconds_of_a_step)
        return self._shape

    def allocate(self, like: TensorList) -> TensorList:
        return [torch.empty_like(tensor) for tensor in like]

    def square_norm(
        self, leaves: Leaves, a: TensorList, b: TensorList | None = None, eta: PerGroup | None = None
    ) -> Tensor:
        sums, _, _ = _kernels()
        theta = None if eta is None else _theta(leaves)
        with guard(leaves):
            tables = self._tables_for(leaves)
            lists = [Argument("a", a), Argument("b", b), Argument("theta", theta)]
            prepared = tables.prepare(lists, [[0.0] * tables.groups if eta is None else eta[: tables.groups]])
            constants = {"DIFFERENCE": b is not None, "WEIGHTED": eta is not None}
            return _add_up(sums.square_norm, prepared, prepared.whole, 1, 1, constants).view(())

    def inner_products(self, leaves: Leaves, u: Direction, m: Direction | None, groups: int) -> Tensor:
        sums, _, _ = _kernels()
        with guard(leaves):
            tables = self._tables_for(leaves)
            of_u = terms_of(u, tables.groups, m)
            of_m = of_u if m is None else terms_of(Direction(u.terms, m.p), tables.groups, u)
            numbers = [x for rows in zip(of_u.numbers, of_m.numbers, strict=True) for row in rows for x in row]
            prepared = tables.prepare(of_u.arguments(), [numbers])
            constants = {"TERMS": len(of_u.lists), "PARTLY": of_u.partly, "WITH_M": m is not None}
            return _add_up(sums.inner_products, prepared, prepared.starts, groups, SUMS, constants)

    def perturb(
        self,
        leaves: Leaves,
        a: TensorList,
        b: TensorList | None,
        radius: PerGroup,
        square: Scalar,
        *,
        from_start: bool,
        eta: PerGroup | None = None,
        folds: Sequence[FoldInto] = (),
    ) -> None:
        _, moves, _ = _kernels()
        if len(folds) > MAX_FOLDS:
            raise ValueError(f"folds must be at most {MAX_FOLDS}, got {len(folds)}")
        with guard(leaves):
            tables = self._tables_for(leaves)
            if not leaves.saved and self._saves_apart(tables.device):
                self._copy(leaves, Argument("params", leaves.params), Argument("backup", leaves.backup, written=True))
                leaves.saved = True
            save = not leaves.saved
            needs_backup = save or from_start or eta is not None
            lists = [
                Argument("params", leaves.params, written=True),
                Argument("backup", leaves.backup if needs_backup else None, written=save),
                Argument("a", a),
                Argument("b", b),
            ]
            for fold in folds:
                lists += (Argument("into", fold.into, written=True), Argument("other", fold.other))
            numbers: list[float] = []
            for g in range(tables.groups):
                of_folds = [x for fold in folds for x in (fold.k[g], fold.l[g])]
                numbers += (radius[g], 0.0 if eta is None else eta[g], *of_folds, *[0.0] * (4 - len(of_folds)))
            prepared = tables.prepare(lists, [numbers])
            constants = {
                "DIFFERENCE": b is not None,
                "WEIGHTED": eta is not None,
                "SAVE": save,
                "FROM_START": from_start,
                "FOLDED": len(folds),
            }
            total, mark = scalars.on_device(square, tables.device), self._mark_on(tables.device)
            self._launches_that_save += save
            ticket = self._launches_that_save
            shape = self._shape_on(tables.device)
            try:
                launch(moves.perturb, prepared, *prepared.numbers, total, mark, ticket, shape=shape, **constants)
                leaves.saved = True
            except BaseException:  # it came before the launch, or after it
                leaves.saved = leaves.saved or _has_run(mark, ticket)
                raise
            after(lists, a, b)

    @staticmethod
    def _saves_apart(device: torch.device) -> bool:
        """Whether the backup needs a launch of its own: the interpreter may be interrupted in the middle of one."""
        return device.type == "cpu"

    def _mark_on(self, device: torch.device) -> Tensor:
        """Where a launch that saves leaves its number, so that one can tell whether it came to it."""
        if self._mark is None:
            self._mark = torch.zeros(1, dtype=torch.int64, device=device)
        return self._mark

    def restore(self, leaves: Leaves) -> None:
        if leaves.saved:
            with guard(leaves):
                self._copy(leaves, Argument("backup", leaves.backup), Argument("params", leaves.params, written=True))

    def _copy(self, leaves: Leaves, source: Argument, target: Argument) -> None:
        _, moves, _ = _kernels()
        tables = self._tables_for(leaves)
        launch(moves.copy, tables.prepare([source, target]), shape=self._shape_on(tables.device))
        after([source, target], source.tensors)

    def direction(self, leaves: Leaves, d: Direction, out: TensorList) -> None:
        _, moves, _ = _kernels()
        with guard(leaves):
            tables = self._tables_for(leaves)
            terms = terms_of(d, tables.groups)
            lists = [
                Argument("out", out, written=True),
                Argument("backup", leaves.backup if leaves.saved else None),
                Argument("params", leaves.params if leaves.saved else None, written=True),
                *terms.arguments(),
            ]
            restore = {"RESTORE": leaves.saved}
            self._launch_along(moves.materialise, tables, lists, d, terms, terms.numbers, constants=restore)
            after(lists, leaves.backup if leaves.saved else None, *terms.lists)

    def sgd(
        self,
        leaves: Leaves,
        d: Direction,
        momentum_buffer: list[Tensor | None],
        first: list[bool],
        groups: Sequence[SGDGroup],
    ) -> None:
        if not takes_state(leaves, momentum_buffer, wider=True):
            EagerBackend().sgd(leaves, d, momentum_buffer, first, groups)
            return
        _, _, updates = _kernels()
        with guard(leaves):
            tables = self._tables_for(leaves)
            terms = terms_of(d, tables.groups)
            has_momentum = [groups[g].momentum != 0.0 for g in leaves.group]
            buffers = [b if has else None for b, has in zip(momentum_buffer, has_momentum, strict=True)]
            lists = [
                Argument("params", leaves.params, written=True),
                Argument("theta", _theta(leaves)),
                Argument("momentum_buffer", buffers, written=True, is_state=True),
                *terms.arguments(),
            ]
            numbers = [
                [h.lr, -1.0 if h.maximize else 1.0, h.weight_decay, h.momentum, 1.0 - h.dampening, h.nesterov, *row]
                for h, row in zip(groups, terms.numbers, strict=False)
            ]
            momentum = {"MOMENTUM": any(has_momentum)}
            self._launch_along(updates.sgd, tables, lists, d, terms, numbers, option=first, constants=momentum)
            after(lists, _theta(leaves), *terms.lists)

    def adam(
        self,
        leaves: Leaves,
        d: Direction,
        exp_avg: TensorList,
        exp_avg_sq: TensorList,
        max_exp_avg_sq: list[Tensor | None],
        step: Sequence[float],
        groups: Sequence[AdamGroup],
    ) -> None:
        if not takes_state(leaves, exp_avg, exp_avg_sq, max_exp_avg_sq, wider=True):
            EagerBackend().adam(leaves, d, exp_avg, exp_avg_sq, max_exp_avg_sq, step, groups)
            return
        _, _, updates = _kernels()
        with guard(leaves):
            tables = self._tables_for(leaves)
            terms = terms_of(d, tables.groups)
            has_largest = [groups[g].amsgrad for g in leaves.group]
            largest = [t if has else None for t, has in zip(max_exp_avg_sq, has_largest, strict=True)]
            lists = [
                Argument("params", leaves.params, written=True),
                Argument("theta", _theta(leaves)),
                Argument("exp_avg", exp_avg, written=True, is_state=True),
                Argument("exp_avg_sq", exp_avg_sq, written=True, is_state=True),
                Argument("max_exp_avg_sq", largest, written=True, is_state=True),
                *terms.arguments(),
            ]
            numbers = [
                [
                    -1.0 if h.maximize else 1.0,
                    0.0 if h.decoupled else h.weight_decay,
                    1.0 - h.lr * h.weight_decay if h.decoupled else 1.0,
                    1.0 - h.beta1,
                    h.beta2,
                    1.0 - h.beta2,
                    h.eps,
                    h.amsgrad,
                    *row,
                ]
                for h, row in zip(groups, terms.numbers, strict=False)
            ]
            places: dict[tuple[int, float], int] = {}  # of each group and step in the corrections
            option = [places.setdefault(key, len(places)) for key in zip(leaves.group, step, strict=True)]
            corrections: list[float] = []
            for g, t in places:
                corrections += (
                    groups[g].lr / (1.0 - groups[g].beta1 ** t),
                    math.sqrt(1.0 - groups[g].beta2 ** t),
                )
            amsgrad = {"AMSGRAD": any(has_largest)}
            self._launch_along(
                updates.adam, tables, lists, d, terms, numbers, [corrections], option=option, constants=amsgrad
            )
            after(lists, _theta(leaves), *terms.lists)

    def _launch_along(
        self,
        kernel: Any,
        tables: Tables,
        lists: Sequence[Argument],
        d: Direction,
        terms: Terms,
        numbers: Sequence[Sequence[float]],
        more: Sequence[Sequence[float]] = (),
        *,
        constants: dict[str, bool],
        option: Sequence[int] = (),
    ) -> None:
        """Launches what goes along a direction: with the numbers of each group, and those that follow from the sums."""
        project, clip = d.q is not None, d.limit is not None
        flat = [x for row in numbers for x in row]
        clipping = [d.limit or 0.0, *d.gamma]
        prepared = tables.prepare(lists, [flat, clipping, *more], option)
        groups, of_clipping, *of_more = prepared.numbers
        products, rows = groups, 0
        if project or clip:
            if d.products is None:
                raise TypeError("products must be given where q or limit is, got None")
            products = scalars.on_device(d.products, tables.device)
            rows = products.numel() // SUMS
            if project and clip and len(d.gamma) != rows:
                raise ValueError(f"gamma must have one number a row of products, that is {rows}, got {len(d.gamma)}")
        launch(
            kernel,
            prepared,
            groups,
            products,
            of_clipping,
            *of_more,
            rows,
            shape=self._shape_on(tables.device),
            TERMS=len(terms.lists),
            PARTLY=terms.partly,
            PROJECT=project,
            CLIP=clip,
            ROWS=max(16, 1 << (rows - 1).bit_length()),
            **constants,
        )


def _theta(leaves: Leaves) -> TensorList:
    return leaves.backup if leaves.saved else leaves.params


def _add_up(
    kernel: Any, prepared: Prepared, starts: Tensor, groups: int, count: int, constants: dict[str, Any]
) -> Tensor:
    """``(groups, count)``: the sums of what ``kernel`` finds of each piece, by group; 0 where there are no starts."""
    sums, _, _ = _kernels()
    parts = starts.new_empty((prepared.programs, count), dtype=torch.float64)
    make = starts.new_zeros if groups >= starts.numel() else starts.new_empty
    found = make((groups, count), dtype=torch.float64)
    launch(kernel, prepared, *prepared.numbers, parts, shape=OF_SUMS, **constants)
    launch_totals(sums.totals, prepared, parts, starts, found)
    return found


def _has_run(mark: Tensor, ticket: int) -> bool:
    """Whether the launch with this number was started. Waits for the device."""
    return torch.equal(mark, torch.full_like(mark, ticket))


def _seconds_of_a_step(device: torch.device, shape: Configuration) -> float:
    """How long SGD along three terms takes with programs of this shape, on 2²⁴ elements of its own."""

    def make() -> TensorList:
        return [torch.zeros(1 << 24, device=device)]

    backend = TritonBackend(shape)
    leaves = Leaves(make(), [0], make(), saved=True)
    d = Direction([make(), make(), make()], [[1.0], [1.0], [1.0]])
    buffers: list[Tensor | None] = [*make()]
    groups = [SGDGroup(0.1, 0.9, 0.0, 0.0, nesterov=False, maximize=False)]
    best = math.inf
    for _ in range(8):  # the first of which compiles
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        backend.sgd(leaves, d, buffers, [False], groups)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best
