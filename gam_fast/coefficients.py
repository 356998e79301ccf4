"""The coefficients of one step: of each vector in the two combinations, by parameter group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .recipes import Fold, Recipe


class Coefficients:
    """What a recipe's table says, evaluated; changed as vectors are folded into others.

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
        sign: −1 for groups that ascend, by group.

    >>> from .recipes import GSAM
    >>> found = Coefficients(GSAM, [{}], [{"rho": 0.1, "alpha": 0.5}])
    >>> found.u, found.m, found.gamma
    ([[0.0], [1.0]], [[1.0], [0.0]], [0.5])
    """

    def __init__(self, recipe: Recipe, groups: Sequence[dict[str, Any]], hyper: Sequence[dict[str, Any]]) -> None:
        found = [recipe.coefficients(h) for h in hyper]
        self.gamma = [gamma for _, _, gamma in found]
        self.sign = [-1.0 if group.get("maximize", False) else 1.0 for group in groups]
        self.u = [[c[i] for c, _, _ in found] for i in range(recipe.vectors)]
        self.m = [[d[i] if d else 0.0 for _, d, _ in found] for i in range(recipe.vectors)]
        for i in recipe.products:
            for part in (self.u, self.m):
                part[i] = [s * x for s, x in zip(self.sign, part[i], strict=True)]

    def part(self, name: str) -> list[list[float]]:
        """The coefficients in the combination ``"u"`` or ``"m"``."""
        return self.u if name == "u" else self.m

    def weigh(self, vector: int, weight: float) -> None:
        """The vector is a part of what it stands for, which is ``weight`` times as long."""
        for part in (self.u, self.m):
            part[vector] = [weight * x for x in part[vector]]

    def folded(self, fold: Fold) -> None:
        """The vector that others were folded into has their coefficients and its own in it."""
        part = self.part(fold.part)
        part[fold.into] = [1.0] * len(self.gamma)
