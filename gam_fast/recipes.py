r"""Every method of the family as data: where its gradients are taken, and how they are combined.

A step evaluates the gradients :math:`g_0, …, g_{N-1}` of one mini-batch loss along a *path* that starts at the
parameters :math:`θ`, and hands the base optimizer one direction

.. math:: d = u - γ\,(m - \frac{⟨m,u⟩}{‖u‖²} u), \qquad u = \sum_i c_i g_i, \quad m = \sum_i d_i g_i .

A :class:`Recipe` states the path, the coefficients ``c`` and ``d`` and the hyper-parameters they are made of. It
knows nothing of tensors: the engine (:mod:`gam_fast.optimizer`) reads it. Adding a published method of the family is
adding one table here and one class in :mod:`gam_fast.methods`.

A recipe of second order has, besides gradients, Hessian-vector products :math:`H g_i / ‖g_i‖` among its vectors: they
are counted with the gradients, in the order in which they are made.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from numbers import Real
from typing import Any, TypeAlias

Hyperparameters: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = "list[list[float]]"
"""By vector and parameter group."""
Coefficient: TypeAlias = "float | Callable[[Hyperparameters], float] | None"


@dataclass(frozen=True)
class Value:
    """The hyper-parameter itself, as a coefficient.

    >>> Value("alpha")({"alpha": 0.3})
    0.3
    """

    name: str

    def __call__(self, hyper: Hyperparameters) -> float:
        return float(hyper[self.name])


@dataclass(frozen=True)
class Share:
    """First (``part=0``) or second (``part=1``) half of a hyper-parameter given as ``a`` or as an explicit pair.

    A number ``a`` stands for the pair ``(a, 1 - a)``.

    >>> Share("beta", 1)({"beta": 0.25}), Share("beta", 1)({"beta": (1.0, 0.25)})
    (0.75, 0.25)
    """

    name: str
    part: int

    def __call__(self, hyper: Hyperparameters) -> float:
        value = hyper[self.name]
        pair = value if isinstance(value, tuple | list) else (value, 1.0 - value)
        return float(pair[self.part])


@dataclass(frozen=True)
class Perturbation:
    r"""From one pass to the next: ``origin + radius · v / (‖v‖ + ξ)`` with ``v = g[along]`` or ``g[along] − g[minus]``.

    ``from_start`` puts the origin at θ, else it is the point of the pass just made. ξ is 1e-12. For an adaptive recipe
    (ASAM) the norm is ``‖T v‖`` and the step ``radius · T² v / (‖T v‖ + ξ)`` with ``T = |θ| + eta``, elementwise.
    """

    along: int
    radius: str
    minus: int | None = None
    from_start: bool = False


@dataclass(frozen=True)
class HessianProduct:
    r"""No step, but one more vector at the same point: ``H g / (‖g‖ + ξ)``, the gradient of ``‖g‖``.

    ``g`` is the gradient of the pass just made, whose loss is differentiated a second time. Its direction does not
    depend on whether a base optimizer descends the loss or (``maximize``) ascends it.
    """


@dataclass(frozen=True)
class Recipe:
    """One method: its path, its coefficients and its hyper-parameters.

    Args:
        name: how it is called in messages.
        citation: where it was published.
        defaults: hyper-parameter names and default values; radii are non-negative numbers in units of the parameters.
        path: a :class:`Perturbation` between each pass and the next, and a :class:`HessianProduct` after a pass that
            needs one; ``len(path) + 1`` vectors.
        u: the coefficient ``c_i`` of each vector; ``None`` where it takes no part.
        m: the coefficient ``d_i`` of each vector, or an empty tuple where the method has no second combination.
        gamma: name of the hyper-parameter γ, needed with ``m``.
        adaptive: name of the hyper-parameter η of the elementwise radius (see :class:`Perturbation`), or ``None``.
        difference: name of the radius that the first move has for the sake of the difference of the gradients at its
            two ends, or ``None``; it may be automatic (:mod:`gam_fast.radius`).

    Raises:
        ValueError: when the table contradicts itself (a move along a gradient not yet taken, a coefficient missing).

    >>> SAM.passes, GAM.passes, EXACT_GAM.passes
    (2, 4, 2)
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

    def __post_init__(self) -> None:
        n = self.vectors
        if len(self.u) != n or self.u[-1] is None:
            raise ValueError(f"recipe {self.name}: u needs {n} coefficients, the last not None, got {self.u!r}")
        if len(self.m) not in (0, n) or bool(self.m) != (self.gamma is not None):
            raise ValueError(f"recipe {self.name}: m needs {n} coefficients and a gamma, or neither")
        for i, move in enumerate(self.path):
            if isinstance(move, HessianProduct):
                if i in self.products:
                    raise ValueError(f"recipe {self.name}: step {i} would differentiate a Hessian-vector product")
                continue
            if not (0 <= move.along <= i and (move.minus is None or 0 <= move.minus <= i)):
                raise ValueError(f"recipe {self.name}: move {i} goes along a gradient that is not taken yet: {move}")
        if self.difference and (len(self.perturbations) < 2 or self.perturbations[0].radius != self.difference):
            raise ValueError(f"recipe {self.name}: the first move does not have the radius {self.difference!r}")
        names = {move.radius for move in self.perturbations} | {name for name in (self.gamma, self.adaptive) if name}
        if not names <= set(self.defaults):
            raise ValueError(f"recipe {self.name}: no default for {sorted(names - set(self.defaults))}")

    def __getstate__(self) -> dict[str, Any]:
        """The table alone: what follows from it is worked out by the release that reads it."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def perturbations(self) -> tuple[Perturbation, ...]:
        """The steps of the path that go to another point."""
        return tuple(step for step in self.path if isinstance(step, Perturbation))

    @cached_property
    def vectors(self) -> int:
        """Gradients and Hessian-vector products in one step."""
        return len(self.path) + 1

    @cached_property
    def passes(self) -> int:
        """Points of the path, at each of which the loss is evaluated once."""
        return len(self.perturbations) + 1

    @cached_property
    def plan(self) -> FoldPlan:
        """The fate of the vectors on the way, see :func:`fold_plan`."""
        return fold_plan(self)

    @cached_property
    def keeps(self) -> tuple[bool, ...]:
        """For each vector, whether it is needed after the next pass as it was taken over."""
        return (*(i in live and i + 1 not in self.products for i, (_, live) in enumerate(self.plan)), False)

    @cached_property
    def plain(self) -> Recipe:
        """The base optimizer alone, in the name of this recipe: the step where an interval or a rule leaves it out.

        >>> GAM.plain.name, GAM.plain.passes
        ('GAM', 1)
        """
        return replace(BASE, name=self.name)

    @cached_property
    def products(self) -> tuple[int, ...]:
        """The vectors that are Hessian-vector products, each of the gradient before it."""
        return tuple(i + 1 for i, step in enumerate(self.path) if isinstance(step, HessianProduct))

    @cached_property
    def second_order(self) -> bool:
        """Whether the loss is differentiated twice."""
        return bool(self.products)

    @cached_property
    def passes_before(self) -> tuple[int, ...]:
        """For each vector, the pass that it comes from.

        >>> EXACT_GAM.passes_before
        (0, 0, 1, 1)
        """
        return tuple(accumulate((isinstance(step, Perturbation) for step in self.path), initial=0))

    def coefficients(self, hyper: Hyperparameters) -> tuple[list[float], list[float], float]:
        """``(c, d, γ)`` for one parameter group; 0.0 where a gradient takes no part, ``d`` empty without ``m``.

        >>> GAM.coefficients({"alpha": 0.25, "beta": 0.5, "gamma": 0.03})
        ([0.0, 0.25, 0.0, 0.75], [0.5, 0.0, 0.5, 0.0], 0.03)
        """
        c, d = (
            [0.0 if x is None else float(x(hyper)) if callable(x) else float(x) for x in row]
            for row in (self.u, self.m)
        )
        return c, d, float(hyper[self.gamma]) if self.gamma else 0.0

    def check(self, name: str, value: Any) -> None:
        """Raise ``ValueError`` or ``TypeError``, naming the value, unless it can be hyper-parameter ``name``."""
        if name == self.difference and isinstance(value, str):
            return  # what words there are is the business of gam_fast.radius
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
        radii = {move.radius for move in self.perturbations} | {self.adaptive}
        if name in radii and value < 0:
            raise ValueError(f"{self.name}: {name} must not be negative, got {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _product(hyper: Hyperparameters) -> float:
    return float(hyper["lam"]) * float(hyper["alpha"])


def _one_minus_product(hyper: Hyperparameters) -> float:
    return 1.0 - _product(hyper)


def _rest_product(hyper: Hyperparameters) -> float:
    return float(hyper["lam"]) * (1.0 - float(hyper["alpha"]))


def _minus_rest_product(hyper: Hyperparameters) -> float:
    return -_rest_product(hyper)


def _minus_lam(hyper: Hyperparameters) -> float:
    return -float(hyper["lam"])


def _weight_of_flatness(hyper: Hyperparameters) -> float:
    return float(hyper["alpha"]) * float(hyper["rho"])


_SAM_PATH = (Perturbation(along=0, radius="rho"),)


def _gam_path(rho: str, rho_prime: str) -> tuple[Perturbation, ...]:
    """θ; θ + ρ' ĝ0; θ2 = θ + ρ ĥ0 with h0 = g1 − g0; θ2 + ρ' ĝ2."""
    return (Perturbation(0, rho_prime), Perturbation(1, rho, minus=0, from_start=True), Perturbation(2, rho_prime))


BASE = Recipe(name="Base", citation="the base optimizer alone, one pass", defaults={}, path=(), u=(1.0,))

SAM = Recipe(
    name="SAM",
    citation="Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization, ICLR 2021, arXiv 2010.01412",
    defaults={"rho": 0.05},
    path=_SAM_PATH,
    u=(None, 1.0),
)

ASAM = Recipe(
    name="ASAM",
    citation="Kwon, Kim, Park, Choi, ASAM: Adaptive Sharpness-Aware Minimization, ICML 2021, arXiv 2102.11600",
    defaults={"rho": 0.5, "eta": 0.0},
    path=_SAM_PATH,
    u=(None, 1.0),
    adaptive="eta",
)

GSAM = Recipe(
    name="GSAM",
    citation="Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, ICLR 2022, arXiv 2203.08065",
    defaults={"rho": 0.04, "alpha": 0.4},
    path=_SAM_PATH,
    u=(None, 1.0),
    m=(1.0, None),
    gamma="alpha",
)

GRADIENT_NORM_PENALTY = Recipe(
    name="GradientNormPenalty",
    citation="Zhao, Zhang, Hu, Penalizing Gradient Norm for Efficiently Improving Generalization, ICML 2022, "
    "arXiv 2202.03599",
    defaults={"rho": 0.05, "alpha": 0.8},
    path=_SAM_PATH,
    u=(Share("alpha", 1), Share("alpha", 0)),
)

GAM = Recipe(
    name="GAM",
    citation="Zhang, Xu, Yu, Zou, Cui, Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves "
    "Generalization, CVPR 2023, arXiv 2303.03108, Algorithm 2",
    defaults={"rho": 0.2, "rho_prime": 0.02, "alpha": 0.6, "beta": 0.5, "gamma": 0.03},
    path=_gam_path("rho", "rho_prime"),
    difference="rho_prime",
    u=(None, Share("alpha", 0), None, Share("alpha", 1)),
    m=(Share("beta", 0), None, Share("beta", 1), None),
    gamma="gamma",
)

CFLAT = Recipe(
    name="CFlat",
    citation="Bian et al., Make Continual Learning Stronger via C-Flat, NeurIPS 2024, arXiv 2404.00986",
    defaults={"rho": 0.2, "lam": 0.2},
    path=_gam_path("rho", "rho"),
    u=(None, 1.0, _minus_lam, Value("lam")),
)

FAD = Recipe(
    name="FAD",
    citation="Zhang, Xu, Yu, Zou, Cui, Flatness-Aware Minimization for Domain Generalization, ICCV 2023, "
    "arXiv 2307.11108",
    defaults={"rho": 0.05, "rho_prime": 0.05, "alpha": 0.5, "lam": 0.5},
    path=_gam_path("rho", "rho_prime"),
    difference="rho_prime",
    u=(_one_minus_product, _product, _minus_rest_product, _rest_product),
)

EXACT_GAM = Recipe(
    name="ExactGAM",
    citation=GAM.citation.replace("Algorithm 2", "Algorithm 1"),
    defaults={"rho": 0.2, "alpha": 0.1},
    path=(HessianProduct(), Perturbation(1, "rho", from_start=True), HessianProduct()),
    u=(1.0, None, None, _weight_of_flatness),
)
"""The vectors are g0, f = H g0/‖g0‖, the gradient at θ + ρ f/‖f‖, and its product."""

EXACT_GAM_WITH_SAM = Recipe(
    name="ExactGAM",
    citation=f"{EXACT_GAM.citation}; with the gradient of SAM: {SAM.citation}",
    defaults={"rho": 0.2, "alpha": 0.1, "sam_rho": 0.05},
    path=(
        HessianProduct(),
        Perturbation(0, "sam_rho", from_start=True),
        Perturbation(1, "rho", from_start=True),
        HessianProduct(),
    ),
    u=(None, None, 1.0, None, _weight_of_flatness),
)
"""As :data:`EXACT_GAM`, with the gradient of SAM in place of g0."""

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for recipe in (BASE, SAM, ASAM, GSAM, GRADIENT_NORM_PENALTY, GAM, EXACT_GAM, CFLAT, FAD)
}
"""All recipes by name."""


@dataclass(frozen=True)
class Fold:
    """After a move: ``g[into] ← k g[into] + l g[other]`` by the coefficients of u or m; ``other`` is then free."""

    into: int
    other: int
    part: str


FoldPlan: TypeAlias = "tuple[tuple[Fold | None, tuple[int, ...]], ...]"


def fold_plan(recipe: Recipe) -> FoldPlan:
    """Return the fold after each step of the path, if there is one, and the vectors that stay live.

    A vector that no later move goes along is folded into the first live one that belongs to the same combination
    (u or m), so that never more than two gradients besides the newest are live: with the backup of θ the three
    buffers of the engine.

    Raises:
        ValueError: for a recipe that would need more than three buffers, or two folds with one move.

    >>> fold_plan(GAM)[2]     # after the third gradient: g0 becomes m, g1 waits for g3
    (Fold(into=0, other=2, part='m'), (0, 1))
    """
    plan = []
    of_m = recipe.m or (None,) * recipe.vectors
    parts = [("" if c is None else "u") + ("" if d is None else "m") for c, d in zip(recipe.u, of_m, strict=True)]
    live: list[int] = []
    for i, step in enumerate(recipe.path):
        live.append(i)
        perturbations = [move for move in recipe.path[i + 1 :] if isinstance(move, Perturbation)]
        later = {k for move in perturbations for k in (move.along, move.minus)}
        live = [k for k in live if parts[k] or k in later]
        folds = []
        for part in ("u", "m") if isinstance(step, Perturbation) else ():  # a fold is carried out with a move
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


_MAXIMIZES = operator.methodcaller("get", "maximize", False)


class Coefficients:
    """The numbers of one step, by parameter group: the table evaluated, and changed as vectors are folded into others.

    A base optimizer with ``maximize=True`` ascends L, that is, descends −L, whose gradients point the other way. The
    norm of a gradient is the same for both, and so is its own gradient, a Hessian-vector product.

    Attributes:
        u, m: the coefficients of each vector, by group; zeros where the recipe has no m.
        gamma: γ by group.
        radius: for each step of the path that is a perturbation, its radius by group, negative in groups that ascend.
        eta: η by group, ``None`` unless the recipe is adaptive.

    >>> found = Coefficients(GSAM, [{}], [{"rho": 0.1, "alpha": 0.5}])
    >>> found.u, found.m, found.gamma, found.radius
    ([[0.0], [1.0]], [[1.0], [0.0]], [0.5], {0: [0.1]})
    """

    def __init__(self, recipe: Recipe, groups: Sequence[dict[str, Any]], hyper: Sequence[dict[str, Any]]) -> None:
        self._made_of = recipe, list(hyper), list(map(_MAXIMIZES, groups))
        found = [recipe.coefficients(h) for h in hyper]
        sign = [-1.0 if maximizes else 1.0 for maximizes in self._made_of[2]]
        self.gamma = [gamma for _, _, gamma in found]
        self._u = [[c[i] for c, _, _ in found] for i in range(recipe.vectors)]
        self._m = [[d[i] if d else 0.0 for _, d, _ in found] for i in range(recipe.vectors)]
        for i in recipe.products:
            for part in (self._u, self._m):
                part[i] = [s * x for s, x in zip(sign, part[i], strict=True)]
        self.eta = [float(h[recipe.adaptive]) for h in hyper] if recipe.adaptive else None
        self.radius: dict[int, list[float]] = {}
        for i, move in enumerate(recipe.path):
            if isinstance(move, Perturbation):
                signs = [1.0] * len(sign) if move.along in recipe.products else sign
                self.radius[i] = [s * float(h[move.radius]) for s, h in zip(signs, hyper, strict=True)]
        self._final: tuple[Rows, Rows | None, Rows, Rows | None] | None = None
        self.u, self.m, self._is_weighed = list(self._u), list(self._m), False

    def again(
        self, recipe: Recipe, groups: Sequence[dict[str, Any]], hyper: Sequence[dict[str, Any]]
    ) -> Coefficients | None:
        """Return the same, as before the first fold, where it is made of the same; else ``None``."""
        if self._made_of != (recipe, hyper, list(map(_MAXIMIZES, groups))):
            return None
        if self._is_weighed:
            self._final = None
        self.u, self.m, self._is_weighed = list(self._u), list(self._m), False
        return self

    def weigh(self, vector: int, weight: float) -> None:
        """The vector is a part of what it stands for, which is ``weight`` times as long."""
        self._is_weighed, self._final = True, None
        for part in (self.u, self.m):
            part[vector] = [weight * x for x in part[vector]]

    def folded(self, fold: Fold) -> None:
        """The vector that others were folded into has their coefficients and its own in it."""
        (self.u if fold.part == "u" else self.m)[fold.into] = [1.0] * len(self.gamma)

    def final(self, vectors: Sequence[int]) -> tuple[Rows, Rows | None, Rows, Rows | None]:
        r"""Return the coefficients of what is left after the last fold, by vector and group: u, m, p, q.

        :math:`u − γ (m − κ u) = Σ (p + κ q) X` with :math:`p = c − γ d` and :math:`q = γ c`; m and q are ``None``
        without m.
        """
        if self._final is None:
            u = [self.u[k] for k in vectors]
            if not self._made_of[0].m:
                self._final = u, None, u, None
            else:
                m = [self.m[k] for k in vectors]
                rows = [list(zip(self.gamma, c, d, strict=True)) for c, d in zip(u, m, strict=True)]
                p = [[c - gamma * d for gamma, c, d in row] for row in rows]
                self._final = u, m, p, [[gamma * c for gamma, c, _ in row] for row in rows]
        return self._final
