"""The primitives as Triton kernels, on NVIDIA and AMD GPUs.

Each primitive is one launch for any number of tensors; sums take a second launch, of one program per group. Formulas,
order and rounding are those of the compiled core: results have the same bits, except sums. As there, nothing waits for
the device, and kernels read norms and products from device memory. The preparation of a launch, which the core does in
C++, is Python here: it takes more time of the host, but not of the GPU. The core takes the gradients if there is one,
also one without code for this GPU, since taking reads no elements.

On CPU tensors the kernels run in Triton's interpreter if ``TRITON_INTERPRET=1`` was set before Triton was imported. It
is thousands of times slower, and meant for tests.

Without Triton, importing this module raises ``ImportError`` with the reason. Triton itself is imported only when a
tensor needs it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import util
from typing import Any

import torch
from torch import Tensor

from ..capture import is_capturing
from ..kernels.table import FORMULAS, SUMS
from ..ownership import lies_as
from . import scalars
from .base import Block, Bookkeeping, Direction, FoldInto, PerGroup, Scalar, TensorList
from .eager import copy_bits
from .launches import after, guard, launch, launch_totals
from .probe import interprets, kernels, why_unusable
from .tables import Argument, Prepared, Tables

if util.find_spec("triton") is None:
    raise ImportError("Triton is not installed: pip install triton on Linux, or a build of torch for CUDA or ROCm")

BOOKKEEPING: Bookkeeping
try:
    from .native import NativeBackend

    BOOKKEEPING = NativeBackend.core
except ImportError:  # no compiled core, or one that does not fit this torch
    from .. import ownership

    BOOKKEEPING = ownership

MAX_PLANS = 4
"""Number of sets of leaves whose tables an optimizer keeps on each device."""


@dataclass(frozen=True)
class Terms:
    """The terms of a direction that at least one group uses.

    Attributes:
        lists: the lists of tensors.
        numbers: for each term, p, q and 1 if the group uses it, by group.
        partly: a bit mask of the terms that some group does not use.
    """

    lists: list[TensorList]
    numbers: list[list[float]]
    partly: int

    def arguments(self) -> list[Argument]:
        return [Argument(f"terms[{t}]", tensors) for t, tensors in enumerate(self.lists)]


def terms_of(d: Direction, groups: int, m: Direction | None = None) -> Terms:
    """Return the terms that ``d`` or ``m`` uses. In groups that do not use a term, its elements are arbitrary."""
    count = len(d.terms)
    coefficients = [d.p, *([d.q] if d.q else []), *([m.p] if m else [])]
    used = [[any(c[t][g] != 0.0 for c in coefficients) for t in range(count)] for g in range(groups)]
    for row in used:
        row[0] = row[0] or not any(row)
    kept = [t for t in range(count) if any(row[t] for row in used)]
    numbers = [
        [x for t in kept for x in (d.p[t][g], d.q[t][g] if d.q else 0.0, 1.0 if row[t] else 0.0)]
        for g, row in enumerate(used)
    ]
    partly = sum(1 << i for i, t in enumerate(kept) if not all(row[t] for row in used))
    return Terms([d.terms[t] for t in kept], numbers, partly)


class TritonBackend:
    """Triton implementation of :class:`gam_fast.backends.base.Backend`, which documents the primitives."""

    name = "triton"
    bookkeeping = BOOKKEEPING

    def __init__(self) -> None:
        self._plans: list[Tables] = []  # most recently used first
        self._mark: Tensor | None = None
        # Above 2³², so that the argument's type does not change, and random, because memory is not cleared.
        self._ticket = (1 << 40) + int.from_bytes(os.urandom(7), "little")

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
        if torch.cuda.is_initialized() and is_capturing([device]):
            return None  # probing is forbidden during a capture
        return why_unusable(device)

    def _tables_for(self, leaves: Block) -> Tables:
        """Return earlier tables that fit, or new ones. Look once per step, and again when leaves were added."""
        if leaves.prepared is not None:
            tables: Tables = leaves.prepared
            return tables
        found = next((tables for tables in self._plans if tables.fits(leaves)), None) or Tables(leaves)
        self._plans = [found, *(tables for tables in self._plans if tables is not found)][:MAX_PLANS]
        leaves.prepared = found
        return found

    def allocate(self, like: TensorList) -> TensorList:
        return [torch.empty_like(tensor) for tensor in like]

    def square_norm(
        self, leaves: Block, a: TensorList, b: TensorList | None = None, eta: PerGroup | None = None
    ) -> Tensor:
        with guard(leaves.params[0].device):
            tables = self._tables_for(leaves)
            lists = [Argument("theta", None if eta is None else _theta(leaves)), Argument("a", a)]
            coefficients = [1.0, 0.0, 1.0]
            if b is not None:
                lists.append(Argument("b", b))
                coefficients += [-1.0, 0.0, 1.0]
            numbers = [x for g in range(tables.groups) for x in (0.0 if eta is None else eta[g], *coefficients)]
            constants = {"TERMS": len(lists) - 1, "PARTLY": 0, "WEIGHTED": eta is not None, "WITH_M": False}
            prepared = tables.prepare(lists, [numbers])
            return _add_up(prepared, prepared.whole, 1, 1, constants).view(())

    def inner_products(self, leaves: Block, u: Direction, m: Direction | None, groups: int) -> Tensor:
        with guard(leaves.params[0].device):
            tables = self._tables_for(leaves)
            of_u = terms_of(u, tables.groups, m)
            rows = [[0.0, *row] for row in of_u.numbers]
            if m is not None:
                of_m = terms_of(Direction(u.terms, m.p), tables.groups, u)
                rows = [[*row, *more] for row, more in zip(rows, of_m.numbers, strict=True)]
            numbers = [x for row in rows for x in row]
            prepared = tables.prepare([Argument("theta", None), *of_u.arguments()], [numbers])
            constants = {"TERMS": len(of_u.lists), "PARTLY": of_u.partly, "WEIGHTED": False, "WITH_M": m is not None}
            found = _add_up(prepared, prepared.starts, groups, SUMS, constants)
            after([], *of_u.lists)
            return found

    def perturb(
        self,
        leaves: Block,
        a: TensorList,
        b: TensorList | None,
        radius: PerGroup,
        square: Scalar,
        *,
        from_start: bool,
        eta: PerGroup | None = None,
        fold: FoldInto | None = None,
        multiple: PerGroup | None = None,
    ) -> None:
        with guard(leaves.params[0].device):
            tables = self._tables_for(leaves)
            if not leaves.saved and self._saves_apart(tables.device):
                copy_bits(leaves.backup, leaves.params)
                leaves.saved = True
            save = not leaves.saved
            needs_backup = save or from_start or eta is not None
            lists = [
                Argument("params", leaves.params, written=True),
                Argument("backup", leaves.backup if needs_backup else None, written=save),
                Argument("a", a),
                Argument("b", b),
            ]
            if fold is not None:
                lists += (Argument("into", fold.into, written=True), Argument("other", fold.other))
            zero = [0.0] * len(radius)
            k, l = (zero, zero) if fold is None else (fold.k, fold.l)  # noqa: E741
            rows = zip(radius, eta or zero, k, l, multiple or zero, strict=True)  # in the order of PERTURB
            numbers = [x for row in rows for x in row]
            prepared = tables.prepare(lists, [numbers])
            constants: dict[str, Any] = {
                "DIFFERENCE": b is not None,
                "WEIGHTED": eta is not None,
                "SAVE": save,
                "FROM_START": from_start,
                "FOLDED": fold is not None,
            }
            total, mark = scalars.on_device(square, tables.device), self._mark_on(tables.device)
            self._ticket += 1
            if save:  # an interrupt may come before or after the launch: restore() checks which
                leaves.ticket = self._ticket
            stride = int(total.numel() > 1)
            launch(kernels().moves.perturb, prepared, *prepared.numbers, total, stride, mark, self._ticket, **constants)
            leaves.saved = True
            after(lists, a, b)

    @staticmethod
    def _saves_apart(device: torch.device) -> bool:
        """Return whether the backup needs its own launch, as in the interpreter, where a launch can be interrupted."""
        return device.type == "cpu"

    def _mark_on(self, device: torch.device) -> Tensor:
        """Return the memory where the launch that makes the backup writes its ticket, as proof that it ran."""
        if is_capturing([device]):  # nothing runs
            return torch.empty(1, dtype=torch.int64, device=device)
        if self._mark is None:
            self._mark = torch.empty(1, dtype=torch.int64, device=device)
        return self._mark

    def restore(self, leaves: Block) -> None:
        """Restore by one torch call, which cannot be interrupted and needs no compilation and no memory."""
        ticket = leaves.ticket
        if not leaves.saved and ticket is not None and not is_capturing([leaves.params[0].device]):
            mark = self._mark_on(leaves.params[0].device)
            leaves.saved = torch.equal(mark, torch.full_like(mark, ticket))  # waits for the device
        if leaves.saved:
            copy_bits(leaves.params, leaves.backup)
            after([], leaves.backup)

    def direction(self, leaves: Block, d: Direction, out: TensorList) -> None:
        count = len(leaves.params)
        groups = [()] * (max(leaves.group) + 1)
        self.update(replace(leaves, params=out, saved=False), d, "assign", [], groups, [()], [0] * count)
        self.restore(leaves)

    def takes_state(self, leaves: Block, state: Sequence[Sequence[Tensor | None]]) -> bool:
        return all(
            value is None or (value.dtype is param.dtype and lies_as(value, param))
            for values in state
            for param, value in zip(leaves.params, values, strict=True)
        )

    def update(
        self,
        leaves: Block,
        d: Direction,
        formula: str,
        state: Sequence[Sequence[Tensor | None]],
        groups: Sequence[Sequence[float]],
        options: Sequence[Sequence[float]],
        option: Sequence[int],
    ) -> None:
        of_group, of_leaf, _ = FORMULAS[formula]
        lacking = [[x is None for x in values] for values in state]
        states = max((i for i, missing in enumerate(lacking, 1) if not all(missing)), default=0)
        lacked = sum(1 << i for i in range(states) if any(lacking[i]))
        with guard(leaves.params[0].device):
            tables = self._tables_for(leaves)
            terms = terms_of(d, tables.groups)
            lists = [
                Argument("params", leaves.params, written=True),
                Argument("theta", _theta(leaves)),
                *terms.arguments(),
                *(Argument(f"state[{i}]", state[i], written=True) for i in range(states)),
            ]
            numbers = [x for row, of_terms in zip(groups, terms.numbers, strict=False) for x in (*row, *of_terms)]
            clipping = [d.limit or 0.0, *d.gamma]
            prepared = tables.prepare(lists, [numbers, clipping, [x for row in options for x in row]], option)
            of_groups, of_clipping, of_options = prepared.numbers
            products, rows = of_groups, 0
            if d.products is not None:
                products = scalars.on_device(d.products, tables.device)
                rows = products.numel() // SUMS
            launch(
                kernels().updates.update,
                prepared,
                of_groups,
                products,
                of_clipping,
                of_options,
                rows,
                FORMULA=getattr(kernels().formulas, formula),
                OF_GROUP=of_group,
                OF_LEAF=of_leaf,
                STATES=states,
                LACKED=lacked,
                TERMS=len(terms.lists),
                PARTLY=terms.partly,
                PROJECT=d.q is not None,
                CLIP=d.limit is not None,
                ROWS=max(16, 1 << (rows - 1).bit_length()),
            )
            after(lists, _theta(leaves), *terms.lists)


def _theta(leaves: Block) -> TensorList:
    return leaves.backup if leaves.saved else leaves.params


def _add_up(prepared: Prepared, starts: Tensor, groups: int, count: int, constants: dict[str, Any]) -> Tensor:
    """Return ``(groups, count)``: the sums over the pieces of each group, 0 where there are no starts."""
    parts = starts.new_empty((prepared.programs, count), dtype=torch.float64)
    make = starts.new_zeros if groups >= starts.numel() else starts.new_empty
    found = make((groups, count), dtype=torch.float64)
    launch(kernels().sums.sums, prepared, *prepared.numbers, parts, is_sum=True, SUMS=count, **constants)
    launch_totals(kernels().sums.totals, prepared, parts, starts, found)
    return found
