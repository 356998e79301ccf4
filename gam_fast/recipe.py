r"""The language that describes a method as data: where its gradients are taken, and how they are combined.

A step evaluates the gradients :math:`g_0, …, g_{N-1}` of one mini-batch loss along a *path* that starts at the
parameters :math:`θ`, and gives the base optimizer one direction

.. math:: d = u - γ\,(m - \frac{⟨m,u⟩}{‖u‖^2} u), \qquad u = \sum_i c_i g_i, \quad m = \sum_i d_i g_i .

A :class:`Recipe` states the path, the coefficients ``c`` and ``d``, and their hyper-parameters. It does not deal with
tensors: the engine (:mod:`gam_fast.optimizer`) interprets it. :mod:`gam_fast.recipes` has the published methods.

The vectors of a second-order recipe include Hessian-vector products :math:`H g_i / ‖g_i‖`. They are numbered with the
gradients, in the order in which they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from numbers import Real
from typing import Any, TypeAlias

Hyperparameters: TypeAlias = Mapping[str, Any]
Coefficient: TypeAlias = "float | Callable[[Hyperparameters], float] | None"


@dataclass(frozen=True)
class Value:
    """The hyper-parameter itself, or a multiple of it, as a coefficient.

    >>> Value("alpha")({"alpha": 0.3}), Value("alpha", -1.0)({"alpha": 0.3})
    (0.3, -0.3)
    """

    name: str
    times: float = 1.0

    def __call__(self, hyper: Hyperparameters) -> float:
        """Return the coefficient for these hyper-parameters."""
        return self.times * float(hyper[self.name])


@dataclass(frozen=True)
class Share:
    """First (``part=0``) or second (``part=1``) entry of a hyper-parameter given as a number or as a pair.

    A number ``a`` stands for the pair ``(a, 1 - a)``.

    >>> Share("beta", 1)({"beta": 0.25}), Share("beta", 1)({"beta": (1.0, 0.25)})
    (0.75, 0.25)
    """

    name: str
    part: int

    def __call__(self, hyper: Hyperparameters) -> float:
        """Return the coefficient for these hyper-parameters."""
        value = hyper[self.name]
        pair = value if isinstance(value, tuple | list) else (value, 1.0 - value)
        return float(pair[self.part])


MOMENTUM = "momentum"
"""Perturb along the base optimizer's momentum in its state: ``momentum_buffer`` or ``exp_avg``."""

MEMORY = "memory"
"""Perturb along the recipe's memory: see :class:`Memory`."""

NOISE = "noise"
r"""Perturb along Gaussian noise: :math:`‖θ_l‖/\sqrt{n_l}` times a normal number per element, n_l in the tensor θ_l."""


@dataclass(frozen=True)
class Perturbation:
    r"""A move to the next pass: ``origin + radius · v / (‖v‖ + ξ)`` with ``v = g[along]`` or ``g[along] − g[minus]``.

    The origin is θ with ``from_start``, and the point of the last pass otherwise. ξ is 1e-12. For an adaptive recipe
    (ASAM) the norm is ``‖T v‖`` and the step ``radius · T² v / (‖T v‖ + ξ)`` with ``T = |θ| + eta``, elementwise.

    In general the step is ``(size / (‖v‖ + ξ) + multiple) v``, where ``size`` defaults to the radius; with ``cap`` it
    is ``min(size / (‖v‖ + offset), cap) v``. ``along`` is the index of a vector of the step, or names an older vector:
    :data:`MOMENTUM`, :data:`MEMORY`, :data:`NOISE`.
    """

    along: int | str
    radius: str
    minus: int | None = None
    from_start: bool = False
    size: Coefficient = None
    multiple: Coefficient = None
    offset: Coefficient = None
    cap: Coefficient = None


MEMORIES = ("gradient_average", "previous_gradient", "sharpness_direction", "direction")
"""The names that a :class:`Memory` may have: keys that gam_fast adds to the base optimizer's state."""


@dataclass(frozen=True)
class Memory:
    r"""A vector m that outlives the step. It is in the base optimizer's state, and as large as the parameters.

    With ``mix = (a, b)``, :math:`g_0 ← a\,g_0 + b\,m` before the first perturbation (if there is an m).
    When the step is taken, ``update = (k, l)`` sets :math:`m ← k\,m + l\,g_0` with the mixed :math:`g_0`, and
    ``orthogonal`` sets :math:`m ← g - \frac{⟨g, g_0⟩}{‖g_0‖^2} g_0` with the newest gradient g, or 0 where only
    rounding is left. A first m is the present :math:`g_0` or g. With ``add`` = α the direction is
    :math:`u + α \frac{‖u‖}{‖m‖} m`.

    Only perturbed parameters have a memory, unless it is ``orthogonal``.
    """

    name: str
    mix: tuple[Coefficient, Coefficient] | None = None
    update: tuple[Coefficient, Coefficient] | None = None
    orthogonal: bool = False
    add: Coefficient = None

    @property
    def is_updated(self) -> bool:
        """True if a step changes the memory."""
        return self.orthogonal or self.update is not None


@dataclass(frozen=True)
class Bounds:
    """The range of a hyper-parameter.

    >>> Bounds(), 1.0 in Bounds(), 1.0 in Bounds(below=True)
    (Bounds(low=0.0, high=1.0, below=False), True, False)
    """

    low: float = 0.0
    high: float = 1.0
    below: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high or (value == self.high and not self.below)

    def __str__(self) -> str:
        return f"from {self.low:g} {'and below' if self.below else 'to'} {self.high:g}"


@dataclass(frozen=True)
class HessianProduct:
    r"""An entry of the path that stays at its point and adds the vector ``H g / (‖g‖ + ξ)``, the gradient of ``‖g‖``.

    ``g`` is the gradient of the last pass, whose loss is differentiated a second time. The vector is the same whether
    the base optimizer descends the loss or (``maximize``) ascends it.
    """


@dataclass(frozen=True)
class Recipe:
    """One method: its path, its coefficients and its hyper-parameters.

    Args:
        name: the method's name in messages.
        citation: the publication.
        defaults: hyper-parameter names and default values; radii are non-negative numbers in units of the parameters.
        path: a :class:`Perturbation` between consecutive passes, and a :class:`HessianProduct` after a pass that
            needs one; ``len(path) + 1`` vectors.
        u: the coefficient ``c_i`` of each vector; ``None`` if it takes no part.
        m: the coefficient ``d_i`` of each vector, or an empty tuple if the method has no second combination.
        gamma: name of the hyper-parameter γ, needed with ``m``.
        adaptive: name of the hyper-parameter η of the elementwise radius (see :class:`Perturbation`), or ``None``.
        difference: name of the first move's radius if that move serves to take the difference of two gradients, or
            ``None``; this radius may be automatic (:mod:`gam_fast.radius`).
        before: a perturbation before the only pass, along a vector from before the step.
        memory: the vector that the method keeps from step to step.
        rescale: whether the direction is scaled to the length of g0.
        after: α of :math:`θ ← θ - η α (g - g_0)`, applied after the base optimizer's step, with the learning rate η and
            the newest gradient g.
        between: the recipe of the steps between those of an interval, in place of the base optimizer alone; the first
            of all steps then takes the whole recipe. (Steps that a rule ``active=`` rejects use the base alone.)
        bounds: the ranges of hyper-parameters, by name.

    Raises:
        ValueError: the recipe contradicts itself (a move along a later gradient, a missing coefficient).

    >>> Recipe("Mine", "", {"rho": 0.1}, path=(Perturbation(0, "rho"),), u=(0.5, 0.5)).passes
    2
    """

    name: str
    citation: str
    defaults: Hyperparameters = field(hash=False)
    path: tuple[Perturbation | HessianProduct, ...]
    u: tuple[Coefficient, ...]
    m: tuple[Coefficient, ...] = ()
    gamma: str | None = None
    adaptive: str | None = None
    difference: str | None = None
    before: Perturbation | None = None
    memory: Memory | None = None
    rescale: bool = False
    after: Coefficient = None
    between: Recipe | None = None
    bounds: Mapping[str, Bounds] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        n = self.vectors
        if len(self.u) != n or (self.u[-1] is None and self.after is None):
            raise ValueError(f"recipe {self.name}: u needs {n} coefficients, the last not None, got {self.u!r}")
        if self.memory is not None and self.memory.mix and (self.passes != 2 or self.u[0] is not None or self.m):
            raise ValueError(f"recipe {self.name}: a memory is mixed into a g0 that serves one step of two passes")
        if self.memory is not None and self.memory.name not in MEMORIES:
            raise ValueError(f"recipe {self.name}: a memory is called {', '.join(MEMORIES)}, got {self.memory.name!r}")
        if self.before is not None and (self.path or not isinstance(self.before.along, str)):
            raise ValueError(
                f"recipe {self.name}: a perturbation before the first pass is the only one, along an older vector"
            )
        if len(self.m) not in (0, n) or bool(self.m) != (self.gamma is not None):
            raise ValueError(f"recipe {self.name}: m needs {n} coefficients and a gamma, or neither")
        for i, move in enumerate(self.path):
            if isinstance(move, HessianProduct):
                if i in self.products:
                    raise ValueError(f"recipe {self.name}: step {i} would differentiate a Hessian-vector product")
                continue
            if move.cap is None and move.offset is not None:
                raise ValueError(f"recipe {self.name}: an offset belongs to a cap: {move}")
            taken = not isinstance(move.along, str) and 0 <= move.along <= i
            if not taken or (move.minus is not None and not 0 <= move.minus <= i):
                raise ValueError(f"recipe {self.name}: move {i} goes along a gradient that is not taken yet: {move}")
        if self.difference and (len(self.perturbations) < 2 or self.perturbations[0].radius != self.difference):
            raise ValueError(f"recipe {self.name}: the first move does not have the radius {self.difference!r}")
        names = self.radii | {name for name in (self.gamma, self.adaptive) if name}
        if not names <= set(self.defaults):
            raise ValueError(f"recipe {self.name}: no default for {sorted(names - set(self.defaults))}")

    def __getstate__(self) -> dict[str, Any]:
        """Return the table alone; the release that reads it recomputes the derived values."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def moves(self) -> bool:
        """True if any pass is at another point than θ."""
        return bool(self.perturbations) or self.before is not None

    @cached_property
    def radii(self) -> set[str]:
        """The names of the radii."""
        return {move.radius for move in (*self.perturbations, *([self.before] if self.before else []))}

    @cached_property
    def needs_lengths(self) -> bool:
        """True if a gradient's length is needed before the last pass, so that it must be unscaled at once."""
        laws = [x for move in self.perturbations for x in (move.multiple, move.cap)]
        lengths = any(x is not None for x in laws) or self.rescale
        return lengths or (self.memory is not None and self.memory.mix is not None)

    @cached_property
    def keeps_first(self) -> bool:
        """True if the end of the step needs g0 for more than the direction."""
        return self.after is not None or (self.memory is not None and self.memory.is_updated)

    @cached_property
    def combined(self) -> set[int]:
        """The vectors in the direction, folded or not, and the last one."""
        in_m = self.m or (None,) * self.vectors
        used = {k for k, (c, d) in enumerate(zip(self.u, in_m, strict=True)) if c is not None or d is not None}
        return used | {self.vectors - 1}

    @cached_property
    def terms(self) -> tuple[int, ...]:
        """The vectors that the direction combines at the end, after all folds."""
        live = (*(self.plan[-1][1] if self.plan else ()), self.vectors - 1)
        return tuple(k for k in live if self.u[k] is not None or (self.m and self.m[k] is not None))

    @cached_property
    def perturbations(self) -> tuple[Perturbation, ...]:
        """The steps of the path that go to another point."""
        return tuple(step for step in self.path if isinstance(step, Perturbation))

    @cached_property
    def vectors(self) -> int:
        """The number of gradients and Hessian-vector products in one step."""
        return len(self.path) + 1

    @cached_property
    def passes(self) -> int:
        """The number of passes: the loss is evaluated once at each point of the path."""
        return len(self.perturbations) + 1

    @cached_property
    def plan(self) -> FoldPlan:
        """The folds and the live vectors along the path: see :func:`fold_plan`."""
        return fold_plan(self)

    @cached_property
    def keeps(self) -> tuple[bool, ...]:
        """For each vector, whether it must outlive the next pass."""
        return (*(i in live and i + 1 not in self.products for i, (_, live) in enumerate(self.plan)), False)

    @cached_property
    def plain(self) -> Recipe:
        """The base optimizer alone, under this recipe's name: for steps that an interval or a rule leaves out.

        >>> from gam_fast.recipes import GAM
        >>> GAM.plain.name, GAM.plain.passes
        ('GAM', 1)
        """
        return Recipe(self.name, "the base optimizer alone, one pass", {}, path=(), u=(1.0,))

    @cached_property
    def products(self) -> tuple[int, ...]:
        """The indices of Hessian-vector products; each belongs to the gradient before it."""
        return tuple(i + 1 for i, step in enumerate(self.path) if isinstance(step, HessianProduct))

    @cached_property
    def second_order(self) -> bool:
        """True if the loss is differentiated twice."""
        return bool(self.products)

    @cached_property
    def passes_before(self) -> tuple[int, ...]:
        """For each vector, the index of its pass.

        >>> from gam_fast.recipes import EXACT_GAM
        >>> EXACT_GAM.passes_before
        (0, 0, 1, 1)
        """
        return tuple(accumulate((isinstance(step, Perturbation) for step in self.path), initial=0))

    def check(self, name: str, value: Any) -> None:
        """Raise ``ValueError`` or ``TypeError``, naming the value, unless it can be hyper-parameter ``name``."""
        if name == self.difference and isinstance(value, str):
            return  # gam_fast.radius checks the string
        pairs = {x.name for x in (*self.u, *self.m) if isinstance(x, Share)}
        if name in pairs and isinstance(value, tuple | list):
            if len(value) != 2 or not all(_is_finite(v) for v in value):
                raise ValueError(
                    f"{self.name}: {name} must be a number a, meaning (a, 1 - a), or a pair, got {value!r}"
                )
            return
        if isinstance(value, bool) or not isinstance(value, Real):
            hint = " or a pair of numbers" if name in pairs else ""
            raise TypeError(f"{self.name}: {name} must be a number{hint}, got {value!r} ({type(value).__name__})")
        if not _is_finite(value):
            raise ValueError(f"{self.name}: {name} must be finite, got {value!r}")
        if (name in self.radii or name == self.adaptive) and value < 0:
            raise ValueError(f"{self.name}: {name} must not be negative, got {value!r}")
        if name in self.bounds and float(value) not in self.bounds[name]:
            raise ValueError(f"{self.name}: {name} must be {self.bounds[name]}, got {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def value_of(coefficient: Coefficient, hyper: Hyperparameters) -> float:
    """Return the number; 0.0 for ``None``."""
    return 0.0 if coefficient is None else float(coefficient(hyper) if callable(coefficient) else coefficient)


@dataclass(frozen=True)
class Fold:
    """A fold with a move: ``g[into] ← k g[into] + l g[other]``, k and l from u or m; ``other`` is then free."""

    into: int
    other: int
    part: str


FoldPlan: TypeAlias = "tuple[tuple[Fold | None, tuple[int, ...]], ...]"


def fold_plan(recipe: Recipe) -> FoldPlan:
    """Return the fold after each step of the path, if there is one, and the vectors that stay live.

    A vector that no later move needs is folded into the first live one of the same combination (u or m). So at most two
    gradients besides the newest are live, which makes, with the backup of θ, the engine's three buffers.

    Raises:
        ValueError: for a recipe that would need more than three buffers, or two folds with one move.

    >>> from gam_fast.recipes import GAM
    >>> fold_plan(GAM)[2]     # after the third gradient: g0 becomes m, g1 waits for g3
    (Fold(into=0, other=2, part='m'), (0, 1))
    """
    plan = []
    of_m = recipe.m or (None,) * recipe.vectors
    parts = [("" if c is None else "u") + ("" if d is None else "m") for c, d in zip(recipe.u, of_m, strict=True)]
    if recipe.keeps_first:
        parts[0] += " and the end"  # it is never folded
    live: list[int] = []
    for i, step in enumerate(recipe.path):
        live.append(i)
        perturbations = [move for move in recipe.path[i + 1 :] if isinstance(move, Perturbation)]
        later = {k for move in perturbations for k in (move.along, move.minus)}
        live = [k for k in live if parts[k] or k in later]
        folds = []
        for part in ("u", "m") if isinstance(step, Perturbation) else ():  # only a move carries out a fold
            same = [k for k in live if k not in later and parts[k] == part]
            folds += [Fold(same[0], k, part) for k in same[1:]]
            live = [k for k in live if k not in same[1:]]
        if len(live) > 2:
            raise ValueError(
                f"recipe {recipe.name}: vectors {live} are live after step {i} of the path; at most two can be kept"
            )
        if len(folds) > 1:
            raise ValueError(
                f"recipe {recipe.name}: move {i} would have two folds to carry out, {folds}; it can do one"
            )
        plan.append((folds[0] if folds else None, tuple(live)))
    return tuple(plan)
