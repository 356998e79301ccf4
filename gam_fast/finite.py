"""The look at whether what a step has computed is finite, and the ways out of a step where it is not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NoReturn

import torch

from . import sums
from .amp import GivenScale, LossScale
from .backends.base import Products, Scalar
from .recipe import Recipe


class NonFiniteGradientError(FloatingPointError):
    """A pass gave a gradient with NaN or infinity; the step was undone."""


class SkipStep(Exception):
    """Block a step and undoes it without an error to the user."""


class FiniteWatch:
    """Collects the sums of one step. A CPU looks at each at once, an accelerator at all of them after the last pass.

    Args:
        recipe: of the step, for messages.
        policy: ``on_nonfinite`` of the optimizer.
        device: where the scaler of the step works.
        on_host: whether sums are plain numbers.
        at_end: whether the caller looks, by :meth:`is_finite`, when the processes of a local step agree.
    """

    def __init__(self, recipe: Recipe, policy: str, device: torch.device, *, on_host: bool, at_end: bool) -> None:
        self.looks = policy != "ignore"
        self.scale: LossScale | GivenScale | None = None
        self._recipe = recipe
        self._policy = policy
        self._device = device
        self._on_host = on_host
        self._at_end = at_end
        self._totals: list[Scalar | Products] = []
        self._known_finite: set[int] = set()

    def use(self, scale: LossScale | GivenScale | None) -> None:
        """The step is one under a gradient scaler, which always looks, and skips."""
        self.scale = scale
        self.looks = self.looks or scale is not None
        if isinstance(scale, GivenScale) and scale.total is not None:
            self._totals.append(scale.total)

    def check(self, total: Scalar | Products, vectors: set[int], *, last: bool) -> None:
        """Note a sum over ``vectors``; ``last``: there will be no more of them.

        Raises:
            NonFiniteGradientError, SkipStep: it is not finite, where and when that is looked at.
        """
        if not self.looks:
            return
        if self._on_host and not self._at_end:
            # a number needs no generators, which take a microsecond
            finite = math.isfinite(total) if isinstance(total, float) else sums.is_finite((total,))
            if self._totals:  # what a scaler has handed over
                finite = finite and self.is_finite()
        else:
            self._totals.append(total)
            if self._at_end or not last:
                return
            finite = self.is_finite()
        if finite:
            self._known_finite |= vectors
            return
        suspects = sorted({str(self._recipe.passes_before[vector]) for vector in vectors - self._known_finite})
        self.refuse(f"{f'pass {listed(suspects)}' if self._on_host else 'a pass'} of {self._recipe.name}")

    def is_finite(self) -> bool:
        """Return whether all sums that were noted and not looked at are finite; waits for an accelerator."""
        return not self.looks or sums.is_finite(self._totals)

    def refuse(self, where: str) -> NoReturn:
        """Leave the step, because of a gradient of ``where``.

        Raises:
            NonFiniteGradientError, SkipStep: as the policy says; under a scaler always the latter.
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
    """For messages: "1 or 2"."""
    return " or ".join(map(str, values))
