"""Rules that choose which steps take the whole recipe; the others are plain steps of the base optimizer.

Every decision depends only on the number of steps taken and, for :class:`WhenSteep`, on a running mean and variance.
These are stored in ``param_groups`` (``flat_steps``, ``flat_mean``, ``flat_variance``), and so in every ``state_dict``,
as is the threshold of :class:`AboveThreshold`. An undone step does not count.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from .recipe import Recipe
from .turn import frames_of_libraries

STEPS = "flat_steps"
"""The key in ``param_groups`` for the number of steps taken; present only if steps differ."""

LOOKS, MEAN, VARIANCE = "flat_looks", "flat_mean", "flat_variance"
"""The keys for the number of times :class:`WhenSteep` has seen ‖g0‖², and for its running mean and variance."""

HEIGHT = "flat_height"
"""The key for A of :class:`AboveThreshold`."""

COUNTS = (STEPS, LOOKS, MEAN, VARIANCE, HEIGHT)


class Activity:
    """A rule for which steps take the whole recipe. To write your own, override :meth:`before`.

    >>> class EveryThird(Activity):
    ...     def before(self, step):
    ...         return step % 3 == 0
    >>> schedule = StepSchedule(interval=1, active=EveryThird())
    >>> [step for step in range(7) if schedule.wants(step)]
    [0, 3, 6]
    """

    def before(self, step: int) -> bool:
        """Return whether step ``step``, counted from 0, may take the whole recipe. Depend on this number only."""
        return True


@dataclass(frozen=True)
class Between(Activity):
    """Take the whole recipe from step ``start`` up to, but not including, step ``stop``.

    Args:
        start: a step, counted from 0, or (a float) a fraction of the run.
        stop: the same; ``None`` for the end of the run.
        total_steps: steps of the optimizer in the whole run, which fractions need. The first step beyond them warns.

    Raises:
        ValueError: negative, a fraction above 1, a fraction without ``total_steps``, or ``stop`` before ``start``.
        TypeError: a value that is not a number.

    >>> second_half = Between(0.5, total_steps=10)
    >>> [second_half.before(step) for step in (4, 5, 9)]
    [False, True, True]
    """

    start: float = 0
    stop: float | None = None
    total_steps: int | None = None

    def __post_init__(self) -> None:
        if self.total_steps is not None:
            _check_total(self.total_steps)
        first, last = self._step("start", self.start), math.inf if self.stop is None else self._step("stop", self.stop)
        if last < first:
            raise ValueError(f"stop must not come before start, got start={self.start!r}, stop={self.stop!r}")

    def _step(self, name: str, value: float) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a step (an integer) or a fraction of the run (a float), got {value!r}")
        if isinstance(value, int):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
            return value
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} as a fraction of the run must be from 0.0 to 1.0, got {value!r}")
        if self.total_steps is None:
            raise ValueError(f"{name}={value!r} is a fraction of the run: give total_steps=, or {name} as an integer")
        return round(value * self.total_steps)

    def before(self, step: int) -> bool:
        """Return whether the step is in the range."""
        return step >= self._step("start", self.start) and (self.stop is None or step < self._step("stop", self.stop))


@dataclass(frozen=True)
class Late(Activity):
    """Take the whole recipe in the last steps of a run; the steps before are those of the base optimizer alone.

    Args:
        share: the fraction of the steps that take the whole recipe, from 0.0 to 1.0.
        total_steps: steps of the optimizer in the whole run: epochs × batches. The first step beyond them warns.

    Raises:
        ValueError: out of range.
        TypeError: a value that is not a number.

    >>> rule = Late(0.3, total_steps=10)
    >>> [step for step in range(10) if rule.before(step)]
    [7, 8, 9]
    """

    share: float
    total_steps: int

    def __post_init__(self) -> None:
        _check_number("share", self.share)
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"share must be from 0.0 to 1.0, got {self.share!r}")
        _check_total(self.total_steps)

    def before(self, step: int) -> bool:
        """Return whether the step is one of the last."""
        return step >= self.total_steps - round(self.share * self.total_steps)


def _check_total(total_steps: object) -> None:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be a positive integer, got {total_steps!r}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


@dataclass(frozen=True)
class Sometimes(Activity):
    """Take the whole recipe with a fixed probability; a step's random number depends only on the seed and the step.

    Args:
        probability: from 0 to 1.
        seed: not negative; the same on all ranks, because they must agree on the number of passes.

    Raises:
        ValueError: out of range.
        TypeError: a value that is not a number.

    >>> rule = Sometimes(0.5, seed=1)
    >>> sum(rule.before(step) for step in range(1000))
    509
    """

    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_number("probability", self.probability)
        if not 0.0 <= self.probability <= 1.0:
            raise ValueError(f"probability must be from 0 to 1, got {self.probability!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer that is not negative, got {self.seed!r}")

    def before(self, step: int) -> bool:
        """Return whether the number drawn for the step is below the probability."""
        return random.Random((self.seed << 64) | step).random() < self.probability


class Looking(Activity):
    """Base class of rules that look at the gradient at θ before they decide.

    If the rule says no, the step is a base optimizer step along :math:`g_0`. If :math:`g_0` came from a share of the
    batch, one more pass computes the gradient of the whole batch. The loop over ``passes()`` ends by itself.

    The rule needs the gradient's norm on the host: on an accelerator the step waits for the first pass, so a CUDA
    graph cannot capture it. In data parallelism all processes decide by the mean of their ‖g0‖².
    """

    @property
    def start(self) -> dict[str, float]:
        """The initial values of the numbers that the rule keeps in each parameter group."""
        raise NotImplementedError

    def decide(self, square: float, kept: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
        """Return the decision for ``square`` = ‖g0‖², and the numbers to store once the step is taken."""
        raise NotImplementedError


@dataclass(frozen=True)
class WhenSteep(Looking):
    r"""Take the whole recipe if the gradient at θ is large compared with earlier ones: :math:`‖g_0‖^2 ≥ μ + c\,σ`.

    .. math:: μ ← δ μ + (1−δ) ‖g_0‖^2, \qquad σ^2 ← δ σ^2 + (1−δ) (‖g_0‖^2 − μ)^2

    The rule updates μ and σ² at every step that the other rules allow. At the first such step μ is :math:`‖g_0‖^2` and
    σ is 0, so this step takes the whole recipe. :class:`Looking` describes the consequences of a decision and its cost.

    Source: Jiang, Yang, Zhang, Kwok, *An Adaptive Policy to Employ Sharpness-Aware Minimization*, ICLR 2023, arXiv
    2304.14647. There c goes from 1 to −1 in the course of the run; here it is constant.

    Args:
        deviations: c. With 0, about half of the steps take the whole recipe; with larger values, fewer.
        decay: δ, at least 0 and below 1.

    Raises:
        ValueError, TypeError: a value that is out of range or not a number.

    >>> WhenSteep(deviations=1.0).look(9.0, 1, 4.0, 0.0)     # μ 4.5, σ² .1·4.5²; 9 ≥ 4.5 + 1.42
    (True, 4.5, 2.02...)
    """

    deviations: float = 0.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        for name, value in (("deviations", self.deviations), ("decay", self.decay)):
            _check_number(name, value)
        if not math.isfinite(self.deviations):
            raise ValueError(f"deviations must be finite, got {self.deviations!r}")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be at least 0 and below 1, got {self.decay!r}")

    def look(self, square: float, looks: int, mean: float, variance: float) -> tuple[bool, float, float]:
        """Return whether ``square`` = ‖g0‖² is large, and the new mean and variance, after ``looks`` earlier values."""
        if looks == 0:
            return True, square, 0.0
        mean = self.decay * mean + (1.0 - self.decay) * square
        variance = self.decay * variance + (1.0 - self.decay) * (square - mean) ** 2
        return square >= mean + self.deviations * math.sqrt(variance), mean, variance

    @property
    def start(self) -> dict[str, float]:
        """Zeros."""
        return {LOOKS: 0, MEAN: 0.0, VARIANCE: 0.0}

    def decide(self, square: float, kept: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
        """Return :meth:`look` at ``square`` and the updated count, mean and variance."""
        looks = int(kept[LOOKS])
        found, mean, variance = self.look(square, looks, float(kept[MEAN]), float(kept[VARIANCE]))
        return found, {LOOKS: looks + 1, MEAN: mean, VARIANCE: variance}


@dataclass(frozen=True)
class AboveThreshold(Looking):
    r"""Take the whole recipe if the gradient at θ is as long as a threshold that rises during the run (C-Flat++).

    .. math:: E_t = \frac{A}{1 + e^{-k (t - t_0)}} - ‖g_0‖, \qquad A ← A - c\, E_t

    The step takes the whole recipe if :math:`E_t ≤ 0`; t counts the evaluations of the rule from 1. :class:`Looking`
    describes the consequences of a decision and its cost.

    Source: Li, Yuan, Zhao, Zhu, Lu, Feng, Sun, C-Flat++, arXiv 2508.18860. Formula and defaults are those of the
    authors' code, in which each process decides by its own gradient.

    Args:
        height: A at the start.
        slope: k.
        middle: :math:`t_0`.
        rate: c, from 0 to 1.

    Raises:
        ValueError, TypeError: a value that is out of range or not a number.

    >>> rule = AboveThreshold(height=4.0, slope=0.0, rate=0.5)
    >>> rule.decide(9.0, rule.start)     # the threshold is 2, the length 3
    (True, {'flat_looks': 1, 'flat_height': 4.5})
    """

    height: float = 5.0
    slope: float = 0.01
    middle: float = 80.0
    rate: float = 0.005

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _check_number(name, value)
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
        if self.height < 0.0:
            raise ValueError(f"height must not be negative, got {self.height!r}")
        if not 0.0 <= self.rate <= 1.0:
            raise ValueError(f"rate must be from 0.0 to 1.0, got {self.rate!r}")

    @property
    def start(self) -> dict[str, float]:
        """The initial threshold, and a count of 0."""
        return {LOOKS: 0, HEIGHT: float(self.height)}

    def decide(self, square: float, kept: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
        """Return whether ‖g0‖ reaches the threshold, and the updated count and A."""
        looks, height = int(kept[LOOKS]) + 1, float(kept[HEIGHT])
        share = 0.5 * (1.0 + math.tanh(0.5 * self.slope * (looks - self.middle)))  # the logistic function
        excess = height * share - math.sqrt(square)
        return excess <= 0.0, {LOOKS: looks, HEIGHT: height - self.rate * excess}


@dataclass(frozen=True)
class _Called(Activity):
    """A rule given as a function of the step number."""

    function: Callable[[int], Any]

    def before(self, step: int) -> bool:
        return bool(self.function(step))


Rule: TypeAlias = "Activity | Callable[[int], Any]"
Rules: TypeAlias = "Rule | list[Rule] | tuple[Rule, ...] | None"
"""Values of ``active=``: one rule, or several that must all agree. A function of the step number is a rule too."""


class StepSchedule:
    """The schedule that ``interval=`` and ``active=`` define; one object, for wrappers that copy attributes.

    Args:
        interval: every ``interval``-th step takes the whole recipe; with infinity, none does.
        active: the rules.

    Attributes:
        trigger: the rule that needs a gradient, or ``None``.
        is_always: whether every step takes the whole recipe.

    Raises:
        ValueError: an interval below 1, two rules that need a gradient.
        TypeError: an interval that is not an integer, or a rule that is none.

    >>> schedule = StepSchedule(interval=3, active=Between(4))
    >>> [step for step in range(10) if schedule.wants(step)]
    [5, 8]
    """

    def __init__(self, interval: float = 1, active: Rules = None) -> None:
        if isinstance(interval, bool) or not (isinstance(interval, int) or interval == math.inf):
            raise TypeError(f"interval must be an integer, or math.inf for never, got {interval!r}")
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval!r}")
        self.interval = interval
        self.active = active
        self._rules = _rules(active)
        triggers = [rule for rule in self._rules if isinstance(rule, Looking)]
        if len(triggers) > 1:
            names = ", ".join(type(rule).__name__ for rule in triggers)
            raise ValueError(f"active must have one rule at most that looks at the gradient, got {names}")
        self.trigger = triggers[0] if triggers else None
        self.is_always = interval == 1 and not self._rules

    def change(self, interval: float, active: Rules) -> None:
        """Replace interval and rules. Raises the errors of the constructor, and then changes nothing."""
        vars(self).update(vars(StepSchedule(interval, active)))

    @property
    def fields(self) -> dict[str, float]:
        """Return the initial values of the numbers that the schedule keeps in each parameter group."""
        fields: dict[str, float] = {} if self.is_always else {STEPS: 0}
        return fields if self.trigger is None else {**fields, **self.trigger.start}

    def wants(self, step: int, *, first: bool = False) -> bool:
        """Return whether step number ``step`` may take the whole recipe, before its first gradient is known.

        Within each interval the last step may; with ``first``, the first.
        """
        return (self.interval == 1 or (step + (not first)) % self.interval == 0) and self.allows(step)

    def choose(self, recipe: Recipe, step: int) -> Recipe:
        """Return the recipe of the step: the whole one, the one for the steps between, or the base optimizer alone.

        Warn at the first step beyond the ``total_steps`` of a rule.
        """
        for rule in self._rules:
            if getattr(rule, "total_steps", None) == step:
                warnings.warn(
                    f"{step} steps are over, and this one is beyond total_steps of {rule}: total_steps counts steps of "
                    "the optimizer, which are epochs * len(loader), not epochs",
                    stacklevel=frames_of_libraries(),
                )
        between = recipe.between
        if self.wants(step, first=between is not None):
            return recipe
        return between if between is not None and self.allows(step) else recipe.plain

    def allows(self, step: int) -> bool:
        """Return whether the rules allow the step. The interval is ignored."""
        return all(rule.before(step) for rule in self._rules)

    def look(self, square: float, group: Mapping[str, Any]) -> tuple[bool, dict[str, float]]:
        """Return the trigger's decision for ‖g0‖², and the numbers to store once the step is taken."""
        assert self.trigger is not None
        if not math.isfinite(square):  # the step itself handles a non-finite gradient
            return True, {}
        return self.trigger.decide(square, group)


def _rules(active: Rules) -> list[Activity]:
    if active is None:
        return []
    if isinstance(active, Activity):
        return [active]
    if callable(active):
        if isinstance(active, type):
            raise TypeError(f"active must be a rule, got the class {active.__name__}: construct it")
        return [_Called(active)]
    if not isinstance(active, list | tuple):
        raise TypeError(
            f"active must be a rule of gam_fast.active, a function of the step, or a list of these, got {active!r}"
        )
    return [rule for entry in active for rule in _rules(entry)]
