"""The numbers of one step: a recipe's table, evaluated for each parameter group."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeAlias

from torch import Tensor

from .recipe import MEMORY, MOMENTUM, NOISE, Coefficient, Fold, Perturbation, Recipe, Value, value_of

Rows: TypeAlias = "list[list[float]]"
"""Coefficients by vector and parameter group."""

BEFORE = -1
"""Index of the perturbation before the first pass, among the indices of the path."""

_MAXIMIZES = operator.methodcaller("get", "maximize", False)


class Coefficients:
    """The numbers of one step, by parameter group: the recipe's table, updated as vectors are folded.

    A base optimizer with ``maximize=True`` ascends L, that is, descends −L, whose gradients point the other way. The
    norm of a gradient, and the gradient of that norm (a Hessian-vector product), are the same for L and −L.

    Attributes:
        u, m: the coefficients of each vector, by group; zeros where the recipe has no m.
        gamma: γ by group.
        radius, multiple: of each perturbation, by its index in the path and by group; negative in groups that ascend.
        bounds: the offset and the cap of each perturbation that has one, by its index and by group.
        after: coefficient of the step after that of the base optimizer, by group.
        mix, update, add: the coefficients of the memory, by group.
        weights: for each vector that only covers a part of the micro-batches, its factor.
        eta: η by group, ``None`` unless the recipe is adaptive.

    >>> from gam_fast.recipes import GSAM
    >>> found = Coefficients(GSAM, [{}], [{"rho": 0.1, "alpha": 0.5}])
    >>> found.u, found.m, found.gamma, found.radius
    ([[0.0], [1.0]], [[1.0], [0.0]], [0.5], {0: [0.1]})
    """

    def __init__(self, recipe: Recipe, groups: Sequence[dict[str, Any]], hyper: Sequence[dict[str, Any]]) -> None:
        # copies: a list or tensor may be changed in place
        self._made_of = recipe, deepcopy(list(hyper)), list(map(_MAXIMIZES, groups))
        for h in hyper:  # values may have changed since construction
            for name, value in h.items():
                if isinstance(value, Tensor):
                    if not value.is_cpu:  # to read it waits for the device
                        continue
                    value = float(value)
                is_usual = isinstance(value, float) and value >= 0.0 and value < math.inf
                if name in recipe.bounds or not (is_usual or name == recipe.difference):
                    recipe.check(name, value)
        sign = [-1.0 if maximizes else 1.0 for maximizes in self._made_of[2]]
        self._hyper = hyper
        self.gamma = self._by_group(Value(recipe.gamma) if recipe.gamma else None)
        self._u = list(map(self._by_group, recipe.u))
        self._m = list(map(self._by_group, recipe.m or (None,) * recipe.vectors))
        for i in recipe.products:
            for part in (self._u, self._m):
                part[i] = [s * x for s, x in zip(sign, part[i], strict=True)]
        self.after = [s * x for s, x in zip(sign, self._by_group(recipe.after), strict=True)]
        self.eta = [float(h[recipe.adaptive]) for h in hyper] if recipe.adaptive else None
        self.radius: dict[int, list[float]] = {}
        self.multiple: dict[int, list[float]] = {}
        self.bounds: dict[int, tuple[list[float], list[float]]] = {}
        for i, move in ((BEFORE, recipe.before), *enumerate(recipe.path)):
            if isinstance(move, Perturbation):
                given = move.along == MEMORY and recipe.memory is not None and not recipe.memory.is_updated
                is_old = given or move.along in (MOMENTUM, NOISE) or move.along in recipe.products
                signs = [1.0] * len(sign) if is_old else sign
                size = Value(move.radius) if move.size is None else move.size
                self.radius[i] = [s * x for s, x in zip(signs, self._by_group(size), strict=True)]
                if move.multiple is not None:
                    self.multiple[i] = [s * x for s, x in zip(signs, self._by_group(move.multiple), strict=True)]
                if move.cap is not None:
                    self.bounds[i] = self._by_group(move.offset), self._by_group(move.cap)
        memory = recipe.memory
        self.mix = list(map(self._by_group, memory.mix or ())) if memory else []
        self.update = list(map(self._by_group, memory.update or ())) if memory else []
        self.add = self._by_group(memory.add) if memory else []
        self._final: tuple[Rows, Rows | None, Rows, Rows | None] | None = None
        self.u, self.m = list(self._u), list(self._m)
        self.weights: dict[int, float] = {}

    def _by_group(self, coefficient: Coefficient) -> list[float]:
        return [value_of(coefficient, h) for h in self._hyper]

    def again(
        self, recipe: Recipe, groups: Sequence[dict[str, Any]], hyper: Sequence[dict[str, Any]]
    ) -> Coefficients | None:
        """Return these coefficients, reset to before the first fold, if the same values give them; else ``None``."""
        if self._made_of != (recipe, hyper, list(map(_MAXIMIZES, groups))):
            return None
        if self.weights:
            self._final = None
        self.u, self.m, self.weights = list(self._u), list(self._m), {}
        return self

    def weigh(self, vector: int, weight: float) -> None:
        """Multiply a vector by ``weight``, because it covers only a part of the micro-batches."""
        self.weights[vector], self._final = weight, None
        for part in (self.u, self.m):
            part[vector] = [weight * x for x in part[vector]]

    def folded(self, fold: Fold) -> None:
        """Update the coefficients for a fold: the resulting vector already contains both, so its own is 1."""
        (self.u if fold.part == "u" else self.m)[fold.into] = [1.0] * len(self.gamma)

    def final(self, vectors: Sequence[int]) -> tuple[Rows, Rows | None, Rows, Rows | None]:
        r"""Return the coefficients of the vectors left after the last fold, by vector and group: u, m, p, q.

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
