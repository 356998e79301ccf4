"""Detect non-finite gradients and abort the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NoReturn

import torch

from . import sums
from .amp import GivenScale, LossScale, pending
from .backends.base import Products, Scalar
from .recipe import Recipe


class NonFiniteGradientError(FloatingPointError):
    """A pass gave a gradient with NaN or infinity; the step was undone.

    >>> import gam_fast
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    >>> for turn in optimizer.passes():
    ...     (weight * float("nan")).sum().backward()
    Traceback (most recent call last):
    gam_fast.finite.NonFiniteGradientError: pass 0 of SAM gave a gradient that is not finite; ...
    >>> weight.item()
    1.0
    """


class SkipStep(Exception):
    """Abort a step and undo it, without an error for the user."""


class NothingToDo(SkipStep):
    """Abort a step because its first pass has no gradient; what its forward drew and wrote stays."""


class FiniteWatch:
    """Checks the sums of one step: on a CPU each at once, on an accelerator all of them when the update is prepared.

    A sum that is not finite waits on a CPU too if its loss was scaled and the step has no scaler yet: a framework may
    call ``scaler.step(optimizer)`` in the last pass, and the scaler then lowers its scale.

    Args:
        recipe: the recipe of the step, for messages.
        policy: ``on_nonfinite`` of the optimizer.
        device: the device of the scaler.
        on_host: whether sums are Python numbers.
        at_end: whether the caller checks by :meth:`is_finite`, when the processes of a local step agree.

    Attributes:
        since: the time at which a loop began, in which a framework may call ``scaler.step(optimizer)``; or ``None``.
        waits: True if :meth:`confirm` has to be called.
    """

    def __init__(self, recipe: Recipe, policy: str, device: torch.device, *, on_host: bool, at_end: bool) -> None:
        self.looks = policy != "ignore"
        self.scale: LossScale | GivenScale | None = None
        self.since: int | None = None
        self._recipe = recipe
        self._policy = policy
        self._device = device
        self._at_once = on_host and not at_end
        self.waits = not on_host and not at_end
        self._totals: list[Scalar | Products] = []
        self._known_finite: set[int] = set()

    def use(self, scale: LossScale | GivenScale | None) -> None:
        """Use a gradient scaler: the step then always checks its gradients, and is skipped if one is not finite."""
        self.scale = scale
        self.looks = self.looks or scale is not None
        if isinstance(scale, GivenScale) and scale.total is not None:
            self._totals.append(scale.total)

    def check(self, total: Scalar | Products, vectors: set[int]) -> None:
        """Check a sum over ``vectors``; on an accelerator, record it for :meth:`confirm`.

        Raises:
            NonFiniteGradientError, SkipStep: a sum that was checked is not finite.
        """
        if not self.looks:
            return
        if not self._at_once:
            self._totals.append(total)
            return
        # a number needs no generator, which takes a microsecond
        finite = math.isfinite(total) if isinstance(total, float) else sums.is_finite((total,))
        if self._totals:  # passed by a scaler
            finite = finite and self.is_finite()
        if finite:
            self._known_finite |= vectors
            return
        if self.scale is None and self.since is not None and pending(self.since):  # perhaps scaler.step() follows
            self._at_once, self.waits = False, True
            self._totals.append(total)
            return
        suspects = sorted({str(self._recipe.passes_before[vector]) for vector in vectors - self._known_finite})
        self.refuse(f"pass {listed(suspects)} of {self._recipe.name}")

    def confirm(self) -> None:
        """Check what is recorded, before the first write of an update: the only wait for an accelerator in a step.

        Raises:
            NonFiniteGradientError, SkipStep: a sum is not finite.
        """
        if not self.is_finite():
            self.refuse(f"a pass of {self._recipe.name}")
        self._totals.clear()

    def is_finite(self) -> bool:
        """Return whether all recorded sums are finite; wait for the device if they are on an accelerator."""
        return not self.looks or sums.is_finite(self._totals)

    def refuse(self, where: str) -> NoReturn:
        """Abort the step because of a gradient in ``where``.

        Raises:
            NonFiniteGradientError, SkipStep: as the policy says; under a scaler always ``SkipStep``.
        """
        if self.scale is not None:
            self.scale.report(False, self._device)
            raise SkipStep
        if self._policy == "skip":
            raise SkipStep
        raise NonFiniteGradientError(
            f"{where} gave a gradient that is not finite; parameters, running statistics and random state are as "
            "before the step. on_nonfinite='skip' goes on with the next batch instead"
        )


def listed(values: Iterable[object]) -> str:
    """Join the values for a message, as in "1 or 2"."""
    return " or ".join(map(str, values))
