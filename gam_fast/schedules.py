"""Schedules for the radii of a recipe, or for other hyper-parameters, in the style of torch's learning-rate schedulers.

Construct a schedule after the optimizer, and call ``step()`` once per epoch or per iteration, the unit of
``total_steps``. Each parameter group's schedule starts from its value at construction.
"""

from __future__ import annotations

import gc
import math
from numbers import Real
from typing import Any

from torch.optim.lr_scheduler import CyclicLR

from .optimizer import SharpnessAwareOptimizer


class RadiusSchedule:
    """Base class: sets hyper-parameter ``name`` of every group to :meth:`value` after each :meth:`step`.

    Args:
        optimizer: the optimizer whose groups are written.
        name: the recipe's name of the hyper-parameter.

    Attributes:
        count: number of calls of :meth:`step` so far.
        initial: for each group, the value at construction.

    Raises:
        TypeError: the optimizer is not one of gam_fast.
        ValueError: its recipe has no such hyper-parameter, or it is not a number (an automatic radius, a pair).
    """

    def __init__(self, optimizer: SharpnessAwareOptimizer, name: str = "rho") -> None:
        if not isinstance(optimizer, SharpnessAwareOptimizer):
            raise TypeError(f"optimizer must be one of gam_fast, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.name = name
        self.count = 0
        self._key = optimizer.key(name)
        for value in (group[self._key] for group in optimizer.param_groups):
            if not isinstance(value, Real):
                raise ValueError(f"{name} is {value!r}, but only a number can have a schedule")
        self.initial = [float(group[self._key]) for group in optimizer.param_groups]
        self._apply()

    def value(self, initial: float, group: dict[str, Any]) -> float:
        """Return the present value for a group that started from ``initial``."""
        raise TypeError(f"{type(self).__name__} is the base of the schedules: use ConstantRadius, LinearRadius, …")

    def step(self) -> None:
        """Increase ``count``, and set the values.

        Raises:
            RuntimeError: during a step, whose body runs once per pass.
        """
        if self.optimizer.turn is not None:
            raise RuntimeError(
                f"step() of a {type(self).__name__} in a pass of {type(self.optimizer).__name__}: it runs once per "
                "pass, so call it after the loop over passes() or the closure"
            )
        self.count += 1
        self._apply()

    def get_last_value(self) -> list[float]:
        """Return the present values, one per group."""
        return [self._value_of(group) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return everything except the optimizer, as plain numbers."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of :meth:`state_dict`, and set its values."""
        self.__dict__.update({**state_dict, "initial": list(state_dict["initial"])})
        self._apply()

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        # A group that was added meanwhile starts from its present value.
        self.initial += [self._value_of(group) for group in groups[len(self.initial) :]]
        for initial, group in zip(self.initial, groups, strict=False):
            group[self._key] = self.value(initial, group)

    def _value_of(self, group: dict[str, Any]) -> float:
        """Return the value of a group, or the default for a group that was added to the base optimizer directly."""
        return float(group.get(self._key, self.optimizer.defaults[self._key]))

    def _positive_steps(self, total_steps: int) -> int:
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be a positive integer, got {total_steps!r}")
        return total_steps

    def _checked(self, what: str, value: float) -> float:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{what} must be finite and not negative, got {value!r}")
        return float(value)


class ConstantRadius(RadiusSchedule):
    r"""Constant: :math:`ρ_t = ρ_0`, for programs that choose a schedule by name.

    >>> schedule = ConstantRadius(_example())
    >>> schedule.step(); schedule.get_last_value()
    [0.2]
    """

    def value(self, initial: float, group: dict[str, Any]) -> float:
        """Return ``initial``."""
        return initial


class LinearRadius(RadiusSchedule):
    r"""Linear: :math:`ρ_t = ρ_0 + (ρ_T − ρ_0)\, t/T` up to T = ``total_steps``, then constant; a warm-up from 0.

    Args:
        start: :math:`ρ_0`, default: the group's value.
        end: :math:`ρ_T`, default: the group's value.

    Raises:
        ValueError: neither is given.

    >>> schedule = LinearRadius(_example(), total_steps=4, end=0.0)
    >>> schedule.step(); schedule.get_last_value()
    [0.15...]
    >>> warm_up = LinearRadius(_example(), total_steps=4, start=0.0)
    >>> warm_up.step(); warm_up.get_last_value()
    [0.05]
    """

    def __init__(
        self,
        optimizer: SharpnessAwareOptimizer,
        name: str = "rho",
        *,
        total_steps: int,
        end: float | None = None,
        start: float | None = None,
    ) -> None:
        if start is None and end is None:
            raise ValueError("LinearRadius needs start= or end=; the other one defaults to the group's value")
        self.total_steps = self._positive_steps(total_steps)
        self.end = None if end is None else self._checked("end", end)
        self.start = None if start is None else self._checked("start", start)
        super().__init__(optimizer, name)

    def value(self, initial: float, group: dict[str, Any]) -> float:
        """Return the point of the line for the present count."""
        start = initial if self.start is None else self.start
        end = initial if self.end is None else self.end
        return start + (end - start) * min(self.count / self.total_steps, 1.0)


class CosineRadius(RadiusSchedule):
    r"""Cosine: :math:`ρ_t = ρ_T + (ρ_0 − ρ_T)\,(1 + \cos(π t/T))/2` up to T = ``total_steps``, then constant.

    Args:
        end: :math:`ρ_T`.

    >>> schedule = CosineRadius(_example(), total_steps=2, end=0.1)
    >>> schedule.step(); schedule.get_last_value()
    [0.15...]
    """

    def __init__(
        self, optimizer: SharpnessAwareOptimizer, name: str = "rho", *, total_steps: int, end: float = 0.0
    ) -> None:
        self.total_steps = self._positive_steps(total_steps)
        self.end = self._checked("end", end)
        super().__init__(optimizer, name)

    def value(self, initial: float, group: dict[str, Any]) -> float:
        """Return the point of the cosine for the present count."""
        progress = min(self.count / self.total_steps, 1.0)
        return self.end + (initial - self.end) * (1.0 + math.cos(math.pi * progress)) / 2.0


class ProportionalRadius(RadiusSchedule):
    r"""Proportional to the learning rate, as in GSAM; call ``step()`` after the learning-rate scheduler's.

    .. math::
        ρ_t = ρ_{\min} + (ρ_0 − ρ_{\min})
            \frac{\mathrm{lr}_t − \mathrm{lr}_{\min}}{\mathrm{lr}_0 − \mathrm{lr}_{\min}}

    :math:`\mathrm{lr}_0` is the learning rate that belongs to the initial radius. It is the largest learning rate of a
    ``OneCycleLR`` or ``CyclicLR`` of this optimizer; otherwise the rate at construction, before a warm-up lowers it.
    Construct it after that scheduler. Constructed before, it finds the scheduler in its first ``step()``, and the steps
    until then are taken with :math:`ρ_0`. Groups that were loaded from a run with another scheduler keep its ``max_lr``
    and ``initial_lr``: delete these keys.

    Args:
        min_value: :math:`ρ_{\min}`.
        min_lr: :math:`\mathrm{lr}_{\min}`, where the radius reaches ``min_value``.

    Attributes:
        initial_lr: for each group, :math:`\mathrm{lr}_0`.

    >>> optimizer = _example()
    >>> schedule = ProportionalRadius(optimizer)
    >>> optimizer.param_groups[0]["lr"] /= 2; schedule.step(); schedule.get_last_value()
    [0.1]
    """

    def __init__(
        self, optimizer: SharpnessAwareOptimizer, name: str = "rho", *, min_value: float = 0.0, min_lr: float = 0.0
    ) -> None:
        self.min_value = self._checked("min_value", min_value)
        self.min_lr = self._checked("min_lr", min_lr)
        self.initial_lr: list[float] = []
        super().__init__(optimizer, name)

    def _apply(self) -> None:
        groups = self.optimizer.param_groups
        for group in groups[len(self.initial_lr) :]:
            # torch's schedulers record the initial learning rate before a warm-up lowers it.
            self.initial_lr.append(float(group.get("initial_lr", group["lr"])))
        for i, lr in enumerate(self._largest_lr()):
            self.initial_lr[i] = lr
        for lr in self.initial_lr:
            if lr <= self.min_lr:
                raise ValueError(f"min_lr must be below the learning rate {lr}, got {self.min_lr!r}")
        super()._apply()

    def _largest_lr(self) -> list[float]:
        """Return the largest learning rate of each group, for schedulers whose cycle begins below it."""
        groups = self.optimizer.param_groups
        if all("max_lr" in group for group in groups):  # a OneCycleLR
            return [float(group["max_lr"]) for group in groups]
        if self.count > 1:  # by then both schedules exist
            return []
        for found in gc.get_objects():  # CyclicLR leaves no trace in the groups
            if issubclass(type(found), CyclicLR) and found.optimizer.param_groups[0] is groups[0]:
                return [float(lr) for lr in found.max_lrs]
        return []

    def value(self, initial: float, group: dict[str, Any]) -> float:
        """Return the radius for the group's present learning rate."""
        index = next(i for i, other in enumerate(self.optimizer.param_groups) if other is group)
        part = (float(group["lr"]) - self.min_lr) / (self.initial_lr[index] - self.min_lr)
        return max(0.0, self.min_value + (initial - self.min_value) * part)


def _example() -> SharpnessAwareOptimizer:
    """Return a GAM optimizer with ρ = 0.2, for the examples above."""
    import torch

    from .methods import GAM

    return GAM([torch.nn.Parameter(torch.zeros(1))], torch.optim.SGD, lr=0.1, rho=0.2)
