r"""The primitives that a backend implements, and their data types.

Every primitive handles, in one call, any number of tensors: those of all parameter groups on one device. Conventions
for all primitives:

- Lists of tensors are aligned with :attr:`Block.params`: same length, shapes, dtypes, memory order and device. The
  parameters have one dtype, no gaps in memory, and do not overlap. Only ``eager`` accepts other parameters, and
  vectors of another dtype (:attr:`Block.vectors`).
- Scalars that may differ between parameter groups come as a sequence indexed by group.
- Tensors are float16, bfloat16, float32 or float64. Arithmetic is done in fp32 (fp64 for float64) and
  rounded once, when a value is stored. Sums are combined in fp64 in a fixed order: a result depends neither on the
  number of threads nor on the run.
- No primitive waits for the device: norms and inner products (:data:`Scalar`, :data:`Products`) stay tensors on an
  accelerator. On a CPU, where reading a tensor costs nothing, the engine passes them back as numbers.
- Reads and writes are counted in units of N, the number of elements of the parameters.
- The engine has checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

TensorList: TypeAlias = "list[Tensor]"
PerGroup: TypeAlias = "Sequence[float]"
Scalar: TypeAlias = "float | Tensor"
Products: TypeAlias = "list[list[float]] | Tensor"
"""``(groups, 3)``: ‖u‖², ⟨m,u⟩ and ‖m‖² by parameter group."""


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums and scales on ``device``: float64, or float32 if the device has no float64 (MPS).

    >>> accumulate_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(eq=False)
class Block:
    """The parameters on one device that take part in a step, and their backup.

    Attributes:
        params: the parameters.
        group: for each, the index of its parameter group.
        backup: a copy of θ, one tensor per parameter, from :meth:`Backend.allocate`; valid once ``saved`` is true.
        vectors: the dtype of gradients and directions if it has more bits than the parameters' dtype, else ``None``.
        saved: set by :meth:`Backend.perturb` when the backup is complete and before any parameter moves, so that an
            interrupt at any point can be undone.
        prepared: data that a backend has derived from params and group; code that changes these sets it to ``None``.
        ticket: identifies the launch that made the backup, for a backend that cannot otherwise tell whether it ran.
    """

    params: TensorList = field(default_factory=list)
    group: list[int] = field(default_factory=list)
    backup: TensorList = field(default_factory=list)
    saved: bool = False
    vectors: torch.dtype | None = None
    prepared: Any = None
    ticket: int | None = None


@dataclass(frozen=True)
class FoldInto:
    """``into ← k · into + l · other``, with ``k`` and ``l`` by group; done in the same sweep as a perturbation."""

    into: TensorList
    other: TensorList
    k: PerGroup
    l: PerGroup  # noqa: E741


@dataclass(frozen=True)
class Direction:
    r"""The final direction :math:`d = s \sum_t (p_t + κ q_t) X_t`, never stored by a fused backend.

    κ is :math:`⟨m,u⟩/‖u‖^2` over all groups, and s is :math:`\min(1, limit / (‖d‖ + 10^{-6}))`. The backend computes
    both from the products (formulas: :mod:`gam_fast.backends.scalars`).

    Attributes:
        terms: the lists of tensors :math:`X_t`, at most three.
        p: for each term, the plain coefficients by group.
        q: for each term, the coefficients by group that are multiplied by κ; ``None`` without the projection.
        products: the result of :meth:`Backend.inner_products`, summed over devices; needed with ``q`` or ``limit``.
        gamma: γ by group; needed with ``limit``.
        limit: the largest ‖d‖ allowed, or ``None``.
    """

    terms: list[TensorList]
    p: Sequence[PerGroup]
    q: Sequence[PerGroup] | None = None
    products: Products | None = None
    gamma: PerGroup = ()
    limit: float | None = None


class Versions(Protocol):
    """The autograd version counters of tensors at some point in time."""

    def first_changed(self, tensors: TensorList) -> int:
        """Return the position of the first tensor written to since then, or -1."""
        ...


class Bookkeeping(Protocol):
    """Operations on lists of parameters and gradients, between the passes, that do not read or write elements.

    On CPU models with many small tensors, they take most of the time of a step. ``tensors`` and ``params`` are results
    of :meth:`hold`. A module may implement this protocol: :mod:`gam_fast.ownership` and the compiled core do.
    """

    def hold(self, tensors: TensorList, before: TensorList | None = None) -> TensorList:
        """Return the same tensors in the form that is fastest for repeated calls.

        ``before``, an earlier result, may be reused, with everything it has found out about its tensors.
        """
        ...

    def let_go(self, tensors: TensorList) -> None:
        """Release the tensors until the next call of :meth:`hold`."""
        ...

    def kinds(self, tensors: TensorList) -> Sequence[tuple[torch.device, torch.dtype, bool]]:
        """Return each distinct kind of tensor: device, dtype, and whether it is dense in memory."""
        ...

    def versions(self, tensors: TensorList) -> Versions:
        """Return the current autograd versions of the tensors."""

    def survey_gradients(self, params: TensorList, flags: bytearray) -> tuple[list[int], bool, int]:
        """Find the gradients.

        Returns:
            The positions of the parameters that have a gradient and no flag; whether any parameter has a gradient; and
            the position of the first sparse gradient, or -1.
        """
        ...

    def clear_gradients(self, params: TensorList, recycle: int, keep_parts: bool = True) -> list[tuple[int, Tensor]]:
        """Remove all gradients, except parts of a buffer that other code holds: these stay and are zeroed.

        Without ``keep_parts`` they are removed too. Return, with their positions, the removed CPU gradients of at least
        ``recycle`` bytes that no other code can reach: their memory can serve for the backup.
        """
        ...

    def take_all_gradients(self, params: TensorList, versions: Any, flags: bytearray, keep: bool) -> TensorList | None:
        """Take the fast path of :meth:`take_gradients`. Return None, and do nothing, if it does not apply.

        It applies if no tensor was written to since ``versions``, all flags are equal, and every parameter has a dense
        gradient whose dtype has no more bits than the parameter's.
        """
        ...

    def take_gradients(self, params: TensorList, keep: bool) -> TensorList:
        """Return the gradients in the parameters' dtypes and memory order, and zeros for missing gradients.

        With ``keep`` the engine may overwrite the result, and the parameters' gradients are removed. A gradient that
        other code could see change is copied; it stays in place if it may be part of a buffer.
        """
        ...

    def count_steps(self, steps: Sequence[Tensor], write: bool) -> list[float]:
        """Return counters, 0-dim tensors on the CPU, each plus 1; with ``write`` also store that in them."""
        ...


class Backend(Protocol):
    """The primitives that the engine needs. See the module's docstring for the conventions.

    An instance belongs to one optimizer and one device. Between steps it may keep data, but nothing of a parameter's
    size.
    """

    name: str

    @property
    def bookkeeping(self) -> Bookkeeping:
        """The backend's implementation of :class:`Bookkeeping`."""

    @staticmethod
    def describe() -> str:
        """Describe the backend and where it runs, in a line."""
        ...

    @staticmethod
    def refusal(device: torch.device) -> str | None:
        """Return why the backend cannot work on tensors of ``device``, or ``None`` if it can."""
        ...

    def allocate(self, like: TensorList) -> TensorList:
        """Return uninitialised tensors of the same shapes, dtypes and order in memory."""
        ...

    def square_norm(
        self, leaves: Block, a: TensorList, b: TensorList | None = None, eta: PerGroup | None = None
    ) -> Tensor:
        r"""Return :math:`\sum ‖T (a - b)‖^2` over all leaves, 0-dim.

        ``b=None`` means 0. Without ``eta``, T = 1; with it, T = \|θ\| + eta elementwise, where θ is the backup if it is
        saved, and the parameters otherwise. Reads 1 N per list (a, b, θ), writes nothing.
        """
        ...

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
        r"""Compute ``params ← origin + (radius / (√square + ξ) + multiple) · T² (a − b)``, then the fold.

        ``square`` is the result of :meth:`square_norm`, summed over devices, or a float64 tensor of one number per
        group; ξ = 1e-12; ``multiple=None`` is 0. The origin is θ with ``from_start``, and the parameters themselves
        otherwise. T is as in :meth:`square_norm`. If the leaves are not saved yet, the parameters are first copied to
        the backup.

        Reads 1 N each for origin, a, b and (with ``eta``, unless it is the origin) θ; writes 1 N, and 1 N more for the
        first backup. A fold reads at most 1 N and writes 1 N more.
        """
        ...

    def inner_products(self, leaves: Block, u: Direction, m: Direction | None, groups: int) -> Tensor:
        r"""Return a ``(groups, 3)`` tensor of :math:`‖u‖^2`, :math:`⟨m,u⟩`, :math:`‖m‖^2` by parameter group.

        ``u`` and ``m`` share their terms. Without ``m`` the last two columns are 0. Reads 1 N per term.
        """
        ...

    def restore(self, leaves: Block) -> None:
        """Set ``params ← backup``, bit for bit, if the leaves are saved. Reads 1 N, writes 1 N."""
        ...

    def direction(self, leaves: Block, d: Direction, out: TensorList) -> None:
        """Set ``out ← d`` and restore. ``out`` may be one of the terms. Reads 1 N for θ and per term, writes 2 N."""
        ...

    def takes_state(self, leaves: Block, state: Sequence[Sequence[Tensor | None]]) -> bool:
        """Return whether :meth:`update` can work on these tensors."""
        ...

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
        r"""Restore θ, then take one step of a base optimizer with ``d`` in place of the gradient.

        For each formula: the names of its ``state``, of its numbers by group and by leaf, then the update.

        - ``sgd``: b; lr, μ, τ, λ, nesterov, maximize; first.
          :math:`d ← ±d + λ θ`, :math:`b ← μ b + (1−τ) d`, :math:`θ ← θ − lr\,(d + μ b \text{ if nesterov else } b)`,
          with :math:`b ← d` where ``first`` is 1.
        - ``adam``: m, v, largest; β₁, β₂, ε, λ, shrink, maximize; step_size, root_correction.
          :math:`d ← ±d + λ θ`, :math:`m ← m + (1−β_1)(d − m)`, :math:`v ← β_2 v + (1−β_2) d^2`,
          :math:`θ ← shrink\,θ − step\_size \frac{m}{\sqrt{v} / root\_correction + ε}`; with the third state, v in the
          last formula is its running maximum.
        - ``lion``: m; lr, β₁, β₂, λ, shrink, maximize; none.
          :math:`d ← ±d + λ θ`, :math:`θ ← shrink\,θ − lr \operatorname{sign}(m + (1−β_1)(d − m))`,
          :math:`m ← m + (1−β_2)(d − m)`.

        ``state`` has, for each name, one tensor per leaf: zeros before the first step, or ``None`` if the group does
        not use it. ``options`` are the distinct numbers of the leaves; ``option`` gives for each leaf its index in
        them. Reads 1 N for θ, each term and each state; writes 1 N for params and each state.
        """
        ...
