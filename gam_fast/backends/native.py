"""The compiled core on CPU tensors: one fused sweep over memory for each primitive, by all of torch's threads.

Importing this module raises ``ImportError``, with the reason, where the core was not built or does not fit this torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from .. import _C
except ImportError as error:
    raise ImportError(
        f"the compiled core cannot be loaded ({error}); with torch, ninja and a C++17 compiler installed, "
        "pip install --no-build-isolation . builds it"
    ) from error

from .base import AdamGroup, Direction, FoldInto, Leaves, PerGroup, Scalar, SGDGroup, TensorList
from .eager import EagerBackend


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


if _release(_C.torch_version) != _release(torch.__version__):
    raise ImportError(
        f"the compiled core was built for torch {_C.torch_version}, this is {torch.__version__}; install gam_fast again"
    )


class NativeBackend:
    """See :class:`gam_fast.backends.base.Backend` for what each primitive computes."""

    name = "native"

    def __init__(self) -> None:
        self._plan: _C.Plan | None = None

    @staticmethod
    def describe() -> str:
        return (
            f"C++ on CPU tensors, {_C.instruction_set()} code, compiled by {_C.compiler} for torch {_C.torch_version}"
        )

    @staticmethod
    def refusal(device: torch.device) -> str | None:
        return None if device.type == "cpu" else "the compiled core works on CPU tensors"

    def _plan_for(self, leaves: Leaves) -> _C.Plan:
        """The plan of the step before where it fits; looked at once a step, and when leaves were added."""
        plan = leaves.cache.get("plan")
        if isinstance(plan, _C.Plan) and leaves.cache.get("plan_count") == len(leaves.params):
            return plan
        if self._plan is None or not self._plan.fits(leaves.params, leaves.group):
            self._plan = _C.Plan(leaves.params, leaves.group)
        leaves.cache.update(plan=self._plan, plan_count=len(leaves.params))
        return self._plan

    def allocate(self, like: TensorList) -> TensorList:
        return _C.empty_like(like)

    def square_norm(
        self, leaves: Leaves, a: TensorList, b: TensorList | None = None, eta: PerGroup | None = None
    ) -> Tensor:
        return _C.square_norm(self._plan_for(leaves), leaves, a, b, eta)

    def perturb(
        self,
        leaves: Leaves,
        a: TensorList,
        b: TensorList | None,
        radius: PerGroup,
        scale: Scalar,
        *,
        from_start: bool,
        eta: PerGroup | None = None,
        folds: Sequence[FoldInto] = (),
    ) -> None:
        factor = [scale * r for r in radius]
        _C.perturb(self._plan_for(leaves), leaves, a, b, factor, from_start, eta, folds)

    def inner_products(self, leaves: Leaves, u: Direction, m: Direction | None, groups: int) -> Tensor:
        return _C.inner_products(self._plan_for(leaves), u.terms, u.p, None if m is None else m.p, groups)

    def restore(self, leaves: Leaves) -> None:
        _C.restore(self._plan_for(leaves), leaves)

    def direction(self, leaves: Leaves, d: Direction, out: TensorList) -> None:
        _C.direction(self._plan_for(leaves), leaves, d.terms, _factors(d), out)

    def sgd(
        self,
        leaves: Leaves,
        d: Direction,
        momentum_buffer: list[Tensor | None],
        first: list[bool],
        groups: Sequence[SGDGroup],
    ) -> None:
        if _of_other_dtype(leaves, momentum_buffer):
            EagerBackend().sgd(leaves, d, momentum_buffer, first, groups)
            return
        _C.sgd(self._plan_for(leaves), leaves, d.terms, _factors(d), momentum_buffer, first, groups)

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
        if _of_other_dtype(leaves, exp_avg):
            EagerBackend().adam(leaves, d, exp_avg, exp_avg_sq, max_exp_avg_sq, step, groups)
            return
        plan = self._plan_for(leaves)
        _C.adam(plan, leaves, d.terms, _factors(d), exp_avg, exp_avg_sq, max_exp_avg_sq, step, groups)


def _of_other_dtype(leaves: Leaves, state: Sequence[Tensor | None]) -> bool:
    """Whether a model was converted after its optimizer had stepped: the state then has the dtype of before."""
    return any(s is not None and s.dtype != p.dtype for s, p in zip(state, leaves.params, strict=True))


def _factors(d: Direction) -> list[list[Scalar]]:
    """``s (p + κ q)`` of each term, by group."""
    factors: list[list[Scalar]] = [list(row) for row in d.p]
    if d.q is not None and d.kappa is not None:
        kappa = d.kappa
        factors = [[kappa * y + x for x, y in zip(ps, qs, strict=True)] for ps, qs in zip(d.p, d.q, strict=True)]
    if d.scale is not None:
        scale = d.scale
        factors = [[scale * x for x in row] for row in factors]
    return factors
