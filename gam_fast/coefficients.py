"""The numbers of one step: coefficients and radii, by parameter group."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

from .recipes import Fold, Perturbation, Recipe

ByGroup: TypeAlias = "list[float]"

_MAXIMIZES = operator.methodcaller("get", "maximize", False)


class Coefficients:
    """The table of a recipe, evaluated; changed as vectors are folded into others.

    A base optimizer with ``maximize=True`` ascends L, that is, descends −L, whose gradients point the other way. The
    norm of a gradient is the same for both, and so is its own gradient, a Hessian-vector product.

    Args:
        recipe: the table.
        groups: the parameter groups.
        hyper: the recipe's hyper-parameters, by group.

    Attributes:
        u: for each vector, its coefficient in u, by group.
        m: the same in m; zeros without m.
        gamma: γ by group.
        radius: for each step of the path that is a perturbation, its radius by group, negative in groups that ascend.
        eta: η by group, ``None`` unless the recipe is adaptive.

    >>> from .recipes import GSAM
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
        self.radius: dict[int, ByGroup] = {}
        for i, move in enumerate(recipe.path):
            if isinstance(move, Perturbation):
                signs = [1.0] * len(sign) if recipe.is_product(move.along) else sign
                self.radius[i] = [s * float(h[move.radius]) for s, h in zip(signs, hyper, strict=True)]
        self._final: tuple[list[ByGroup], list[ByGroup] | None, list[ByGroup], list[ByGroup] | None] | None = None
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
        self._is_weighed = True
        for part in (self.u, self.m):
            part[vector] = [weight * x for x in part[vector]]

    def folded(self, fold: Fold) -> None:
        """The vector that others were folded into has their coefficients and its own in it."""
        (self.u if fold.part == "u" else self.m)[fold.into] = [1.0] * len(self.gamma)

    def final(
        self, vectors: Sequence[int]
    ) -> tuple[list[ByGroup], list[ByGroup] | None, list[ByGroup], list[ByGroup] | None]:
        r"""Return the coefficients of what is left after the last fold, by vector and group: u, m, p, q.

        :math:`u − γ (m − κ u) = Σ (p + κ q) X` with :math:`p = c − γ d` and :math:`q = γ c`; m and q are ``None``
        without m.
        """
        if self._final is None or self._is_weighed:
            u = [self.u[k] for k in vectors]
            if not self._made_of[0].m:
                self._final = u, None, u, None
            else:
                m = [self.m[k] for k in vectors]
                rows = [list(zip(self.gamma, c, d, strict=True)) for c, d in zip(u, m, strict=True)]
                p = [[c - gamma * d for gamma, c, d in row] for row in rows]
                self._final = u, m, p, [[gamma * c for gamma, c, _ in row] for row in rows]
        return self._final
