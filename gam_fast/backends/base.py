r"""The primitives a backend implements, and the data they work on.

Every primitive handles a list of any number of tensors, of all parameter groups of one device, in one call.
Conventions for all of them:

- Lists of tensors are aligned with :attr:`Block.params`: same length, shapes, dtypes and order in memory, same
  device. The parameters are of one dtype, without gaps in memory, and none overlaps another. Only ``eager`` takes
  others, and vectors of another dtype (:attr:`Block.vectors`).
- Scalars that may differ between parameter groups come as a sequence indexed by group.
- Tensors are float16, bfloat16, float32 or float64. Arithmetic is done in fp32 (fp64 for float64) and
  rounded once, when a value is stored. Sums are combined in fp64 in a fixed order: a result depends neither on the
  number of threads nor on the run.
- Nothing waits for the device: norms and inner products (:data:`Scalar`, :data:`Products`) stay tensors on an
  accelerator; on a CPU, where reading a tensor costs nothing, the engine hands them back as numbers.
- Reads and writes are given in units of N, the number of elements of the leaves.
- Arguments come from the engine, which has checked them.
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

ACCUMULATE = torch.float64
"""Dtype of norms, inner products and scales; fp32 on a device without fp64 (see :func:`accumulate_dtype`)."""


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """Dtype of scalars on ``device``: float64, or float32 where the device has no float64 (MPS).

    >>> accumulate_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type == "mps" else ACCUMULATE


@dataclass(eq=False)
class Block:
    """The parameters of one device that take part in a step, and their backup.

    Attributes:
        params: the parameters.
        group: for each, the index of its parameter group.
        backup: θ, one tensor a parameter, from :meth:`Backend.allocate`; it counts only once ``saved`` is true.
        vectors: the dtype of the gradients and directions where they have more bits than the parameters, else ``None``.
        saved: set by :meth:`Backend.perturb` once the backup is complete; no signal finds a parameter moved before.
        prepared: what a backend has made of params and group; whoever changes these sets it to ``None``.
        ticket: of the launch that has saved, where a backend cannot tell otherwise whether one has.
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
    """``into ← k · into + l · other``, ``k`` and ``l`` by group; carried out in the same sweep as a perturbation."""

    into: TensorList
    other: TensorList
    k: PerGroup
    l: PerGroup  # noqa: E741


@dataclass(frozen=True)
class Direction:
    r"""The final direction :math:`d = s \sum_t (p_t + κ q_t) X_t`, never stored by a fused backend.

    κ is :math:`⟨m,u⟩/‖u‖²` over all groups, and s is :math:`\min(1, limit / (‖d‖ + 10^{-6}))`; both follow from the
    products, which a backend takes as they are (formulas: :mod:`gam_fast.backends.scalars`).

    Attributes:
        terms: the lists of tensors :math:`X_t`, at most three.
        p: for each term, the plain coefficients by group.
        q: for each term, the coefficients by group that κ multiplies; ``None`` without the projection.
        products: what :meth:`Backend.inner_products` gave, summed over devices; needed with ``q`` or ``limit``.
        gamma: γ by group; needed with ``limit``.
        limit: what ‖d‖ is clipped to, or ``None``.
    """

    terms: list[TensorList]
    p: Sequence[PerGroup]
    q: Sequence[PerGroup] | None = None
    products: Products | None = None
    gamma: PerGroup = ()
    limit: float | None = None


class Versions(Protocol):
    """How often tensors had been written to at some time, as autograd counts it."""

    def first_changed(self, tensors: TensorList) -> int:
        """The position of the first tensor that was written to since; -1 without one."""
        ...


class Bookkeeping(Protocol):
    """What the engine does with lists of parameters and gradients, between the passes, without touching an element.

    On CPU models of many small tensors this, and not memory, is what a step costs. ``tensors`` and ``params`` are what
    :meth:`hold` gave. A module may serve: :mod:`gam_fast.ownership` and the compiled core do.
    """

    def hold(self, tensors: TensorList, before: TensorList | None = None) -> TensorList:
        """The same tensors as the backend likes them best in several calls.

        They may be held by what held them ``before``, which then knows what it knew of them.
        """
        ...

    def let_go(self, tensors: TensorList) -> None:
        """Hold the tensors no longer, until the next call of :meth:`hold`."""
        ...

    def kinds(self, tensors: TensorList) -> Sequence[tuple[torch.device, torch.dtype, bool]]:
        """Return the kinds of the tensors, each once: device, dtype, and whether they are dense in memory."""
        ...

    def versions(self, tensors: TensorList) -> Versions: ...

    def survey_gradients(self, params: TensorList, flags: bytearray) -> tuple[list[int], bool, int]:
        """Look for gradients.

        Returns the positions of the parameters that have a gradient and no flag; whether any has a gradient; and the
        position of the first whose gradient is sparse, or -1.
        """
        ...

    def clear_gradients(self, params: TensorList, recycle: int, keep_parts: bool = True) -> list[tuple[int, Tensor]]:
        """Take all gradients away; those that are parts of a buffer which somebody else holds stay, and are zeroed.

        Without ``keep_parts`` these are taken away too.
        Those of ``recycle`` bytes and more on a CPU that could serve as memory for the backup, as nobody else has a
        hold on them, are handed out with their positions.
        """
        ...

    def take_all_gradients(self, params: TensorList, versions: Any, flags: bytearray, keep: bool) -> TensorList | None:
        """:meth:`take_gradients` where all is as it mostly is.

        That is, no tensor was written to since, all flags are the same, and every parameter has a dense gradient, of no
        more bits than it. Otherwise None, and nothing is done.
        """
        ...

    def take_gradients(self, params: TensorList, keep: bool) -> TensorList:
        """The gradients in the dtypes of the parameters and in their order in memory, zeros where there is none.

        With ``keep`` they are the engine's to overwrite, and the parameters have none; one that somebody else could see
        change is copied, and stays where it is if it may be part of a buffer.
        """
        ...


class Backend(Protocol):
    """What the engine asks of a backend. See the module's docstring for the conventions.

    An instance belongs to one optimizer and one device, and may keep between steps what is not of a parameter's size.
    """

    name: str

    @property
    def bookkeeping(self) -> Bookkeeping: ...

    @staticmethod
    def describe() -> str:
        """Describe the backend and where it runs, in a line."""
        ...

    @staticmethod
    def refusal(device: torch.device) -> str | None:
        """Why it cannot work on tensors of ``device``; ``None`` if it can."""
        ...

    def allocate(self, like: TensorList) -> TensorList:
        """Uninitialised tensors of the same shapes, dtypes and order in memory."""
        ...

    def square_norm(
        self, leaves: Block, a: TensorList, b: TensorList | None = None, eta: PerGroup | None = None
    ) -> Tensor:
        r""":math:`\sum ‖T (a - b)‖²` over all leaves, 0-dim.

        ``b=None`` stands for 0. Without ``eta``, T = 1; with it, T = \|θ\| + eta elementwise, where θ is the backup if
        it is saved, else the parameters. Reads 1 N per list (a, b, θ), writes nothing.
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
        r"""``params ← origin + (radius / (√square + ξ) + multiple) · T² (a − b)``, then the fold.

        ``square`` is what :meth:`square_norm` gave, summed over devices, or a float64 tensor of one number per group;
        ξ = 1e-12; ``multiple=None`` is 0.
        The origin is θ with ``from_start``, else the parameters themselves; T as in :meth:`square_norm`. When the
        leaves are not yet saved, the parameters are first copied to the backup. Reads 1 N for each of origin, a, b and
        (with ``eta``, unless it is the origin) θ; writes 1 N, and 1 N more for the first backup. A fold reads at most
        1 N and writes 1 N more than the move it accompanies.
        """
        ...

    def inner_products(self, leaves: Block, u: Direction, m: Direction | None, groups: int) -> Tensor:
        r"""A ``(groups, 3)`` tensor of :math:`‖u‖²`, :math:`⟨m,u⟩`, :math:`‖m‖²` by parameter group.

        ``u`` and ``m`` share their terms. Without ``m`` the last two columns are 0. Reads 1 N a term.
        """
        ...

    def restore(self, leaves: Block) -> None:
        """``params ← backup``, bit for bit; nothing when the leaves are not saved. Reads 1 N, writes 1 N."""
        ...

    def direction(self, leaves: Block, d: Direction, out: TensorList) -> None:
        """``out ← d`` and restore. ``out`` may be one of the terms. Reads 1 N a term and θ, writes 2 N."""
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
        r"""Restore θ, then one step of a base optimizer with ``d`` in place of the gradient.

        The formulas, each with the names of its ``state``, of its numbers by group, and of those of a leaf:

        - ``sgd``: b; lr, μ, τ, λ, nesterov, maximize; first.
          :math:`d ← ±d + λ θ`, :math:`b ← μ b + (1−τ) d`, :math:`θ ← θ − lr\,(d + μ b \text{ if nesterov else } b)`,
          with :math:`b ← d` where ``first`` is 1.
        - ``adam``: m, v, largest; β₁, β₂, ε, λ, shrink, maximize; step_size, root_correction.
          :math:`d ← ±d + λ θ`, :math:`m ← m + (1−β_1)(d − m)`, :math:`v ← β_2 v + (1−β_2) d²`,
          :math:`θ ← shrink\,θ − step\_size \frac{m}{\sqrt{v} / root\_correction + ε}`; with the third state, v in the
          last formula is its running maximum.
        - ``lion``: m; lr, β₁, β₂, λ, shrink, maximize; none.
          :math:`d ← ±d + λ θ`, :math:`θ ← shrink\,θ − lr \operatorname{sign}(m + (1−β_1)(d − m))`,
          :math:`m ← m + (1−β_2)(d − m)`.

        ``state`` has for each of them one tensor a leaf, new ones zeros, or ``None`` where the group does without.
        ``options`` are the numbers of leaves that differ, ``option`` has for each leaf its place among them. Reads 1 N
        for θ, each term and each state, writes 1 N for params and each state.
        """
        ...
