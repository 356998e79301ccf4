"""The arithmetic of one step: it moves the parameters from pass to pass, and computes the final direction.

Notation: g0 … g3 are the gradients of the passes, θ the parameters at the start, u and m the two combinations of
:mod:`gam_fast.recipe`. Besides the newest vector, only the backup of θ and at most two vectors are held. A recipe of
second order counts its Hessian-vector products among the vectors, each after its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import stored, sums
from .amp import GivenScale, LossScale
from .backends import scalars
from .backends.base import Block, Direction, FoldInto, PerGroup, Products, Scalar, TensorList
from .bases import members
from .coefficients import BEFORE, Coefficients, Rows
from .finite import FiniteWatch
from .local_step import LocalSync
from .noise import add_noise
from .options import Settings
from .parameters import ParameterBlock, StepParameters
from .recipe import MEMORY, MOMENTUM, NOISE, Fold, Memory, Perturbation
from .updates import Directions, fused


class Path:
    """The vectors of one step, and the points where they are taken.

    Args:
        settings: what the optimizer was constructed with.
        base: the base optimizer, for its state.
        coefficients: those of the recipe.
        blocks: the parameters.
        watch: checks the sums.
        local: communication with the other processes of a local step.

    Attributes:
        newest: the index of the newest vector.
        squares: the squared norms by which the perturbations were divided.
        first_square: ‖g0‖², once it is known.
        kept: values for the parameter groups, once the step is taken.
    """

    def __init__(
        self,
        settings: Settings,
        base: Optimizer,
        coefficients: Coefficients,
        blocks: StepParameters,
        watch: FiniteWatch,
        local: LocalSync | None,
    ) -> None:
        self.settings = settings
        self.recipe = settings.recipe
        self.coefficients = coefficients
        self.blocks = blocks
        self.newest = -1
        self.squares: list[Scalar] = []
        self.first_square: Scalar | None = None
        self.kept: dict[str, float] = {}
        self._base = base
        self._watch = watch
        self._local = local
        self._unscaled: set[int] = set()
        self._wanted_square: Scalar = 0.0
        self._rates: list[float] = []
        self._next_memory: list[tuple[ParameterBlock, TensorList]] = []

    def stay(self) -> None:
        """Turn the step into one of the base optimizer alone."""
        self.recipe = self.recipe.plain
        groups = self._base.param_groups
        self.coefficients = Coefficients(self.recipe, groups, [{} for _ in groups])

    def begin(self) -> None:
        """Perturb before the only pass, along a vector from before the step."""
        move = self.recipe.before
        assert move is not None
        assert isinstance(move.along, str)
        blocks, memory = self.blocks, self.recipe.memory
        if self.settings.schedule is not None:
            raise ValueError(
                f"active={self.settings.schedule.trigger} of {self.recipe.name} looks at the gradient at θ, which "
                "this method does not compute: use another rule of gam_fast.active"
            )
        if move.along == NOISE:
            if movable := blocks.movable():
                blocks.activate(movable)
            self.kept.update(add_noise(blocks, self.coefficients.multiple[BEFORE], self._base.param_groups[0]))
            return
        names = stored.MOMENTA if memory is None or move.along != MEMORY else (memory.name,)
        state, movable = self._base.state, blocks.movable()
        known = [i for i in movable if stored.find(blocks.params[i], names, state) is not None]
        if not known:
            owned = [param for param in blocks.params if state.get(param)]
            found = any(stored.find(param, names, state) is not None for param in owned)
            if move.along == MOMENTUM and movable and owned and not found:
                raise RuntimeError(
                    f"{self.recipe.name} perturbs along the momentum of its base optimizer, and this "
                    f"{' + '.join(type(member).__name__ for member in members(self._base))} has none in its state "
                    f"({' or '.join(names)}): pass momentum=0.9, or a base optimizer such as AdamW"
                )
            return
        blocks.activate(known)
        for block in blocks.all:
            block.grads[BEFORE] = stored.of_block(block, names, state).values
        norm = blocks.square_norms if self.settings.norm == "group" else blocks.square_norm
        self._move(BEFORE, move, BEFORE, norm(BEFORE))

    def perturb(self) -> None:
        """Move from the last pass to the next point of the path, and fold vectors that are no longer needed."""
        index, recipe, blocks = self.newest, self.recipe, self.blocks
        if index < 0:  # stay at θ
            return
        move, eta = recipe.path[index], self.coefficients.eta
        assert isinstance(move, Perturbation)
        assert isinstance(move.along, int)
        along, minus = move.along, move.minus
        if self._watch.scale is not None and recipe.needs_lengths:
            self._unscale([along], self._watch.scale)
        if recipe.memory is not None and recipe.memory.mix is not None:
            self._mix(recipe.memory)
        if self.settings.norm == "group":
            square: Scalar = (squares := blocks.square_norms(along, minus))  # ‖v‖², one per group
            total: Scalar = float(squares.sum()) if blocks.on_host else squares.sum()
        elif along == 0 and minus is None and eta is None:
            if self.first_square is None:
                self.first_square = blocks.square_norm(0)
            square = total = self.first_square
        else:
            square = total = blocks.square_norm(along, minus, eta)
        if recipe.rescale:
            self._wanted_square = blocks.square_norm(0, whole=True) if blocks.is_mixed else total
            self._watch.check(self._wanted_square, {0})
        self._watch.check(total, {along} if minus is None else {along, minus})
        self.squares.append(total)
        self._move(index, move, along, square, *recipe.plan[index])

    def _move(
        self,
        index: int,
        move: Perturbation,
        along: int,
        square: Scalar,
        fold: Fold | None = None,
        live: tuple[int, ...] = (),
    ) -> None:
        """Move every block along its vector ``along``, fold in the same sweep, and drop all vectors but the live ones.

        ``square`` is ‖v‖². ``index`` is that of the move in the path, or :data:`BEFORE`.
        """
        coefficients, minus = self.coefficients, move.minus
        multiple = coefficients.multiple.get(index) if coefficients.multiple else None
        weight = coefficients.weights.get(along, 1.0) if coefficients.weights else 1.0
        if multiple is not None and weight != 1.0:
            multiple = [weight * x for x in multiple]
        if index in coefficients.bounds:
            square = scalars.bounded(square, coefficients.radius[index], *coefficients.bounds[index], weight)
        for block in self.blocks.all:
            into = None
            if fold is not None:
                part = coefficients.u if fold.part == "u" else coefficients.m
                into = FoldInto(block.grads[fold.into], block.grads[fold.other], part[fold.into], part[fold.other])
            if block.perturbed:
                if not block.saved:
                    block.backup = self.blocks.allocate_backup(block)
                seen = square if self.blocks.on_host else sums.on(square, block.params[0].device)
                block.backend.perturb(
                    block,
                    block.grads[along],
                    None if minus is None else block.grads[minus],
                    coefficients.radius[index],
                    seen,
                    from_start=move.from_start,
                    eta=coefficients.eta if block.adaptive else None,
                    fold=into,
                    multiple=multiple,
                )
            elif into is not None:
                block.backend.direction(block, Direction([into.into, into.other], [into.k, into.l]), into.into)
            for k in set(block.grads) - set(live):
                del block.grads[k]
        if fold is not None:
            coefficients.folded(fold)

    def _mix(self, memory: Memory) -> None:
        """Replace g0 by its mixture with the memory."""
        a, b = self.coefficients.mix
        weight = self.coefficients.weights.get(0, 1.0)
        self.first_square = None
        for block in self.blocks.all:
            if not block.perturbed:
                continue
            own, gradient = stored.of_block(block, (memory.name,), self._base.state), block.grads[0]
            if weight != 1.0:
                torch._foreach_mul_(list(gradient), weight)
            if len(own.new) < len(gradient):
                first = [gradient[i].clone() for i in own.new]
                mixed = Direction([gradient, own.values], [a, b])
                block.backend.direction(block, mixed, gradient)
                if first:
                    torch._foreach_copy_([gradient[i] for i in own.new], first)

    # The end of a step

    def directions(self) -> Directions:
        """Return the final direction of every block, after the last pass."""
        recipe, watch, blocks, local = self.recipe, self._watch, self.blocks, self._local
        vectors, last = list(recipe.terms), recipe.vectors - 1
        if watch.scale is not None:
            self._unscale(sorted({*vectors, last, *((0,) if recipe.keeps_first else ())}), watch.scale)
        u, m, p, q = self.coefficients.final(vectors)
        gammas, limit = self.coefficients.gamma, self.settings.clip_grad_norm
        terms = [(block, list(map(block.grads.__getitem__, vectors))) for block in blocks.all]
        products: Products | None = None
        is_orthogonal = recipe.memory is not None and recipe.memory.orthogonal
        other = last if recipe.after is not None else 0 if is_orthogonal else None
        if terms and (q is not None or limit is not None or watch.looks or recipe.rescale or is_orthogonal):
            if other is None:
                products = blocks.inner_products(terms, u, m)
            else:  # it is not a term of the direction, but its products are needed
                none, one = [0.0] * len(gammas), [1.0] * len(gammas)
                products = blocks.inner_products(self._terms([*vectors, other]), [*u, none], [*([none] * len(u)), one])
            watch.check(products, recipe.combined if other is None else {0, last})
        if local is not None:
            difference = self.settings.difference
            change = local.agree(blocks, watch, None if difference is None else self._relative_change())
            self._keep_length(change)
            # gradients that only other processes have are zeros here from now on
            terms = self._terms(vectors)
            limit = None  # the mean is clipped instead
        if recipe.rescale and products is not None:
            p, q, products, gammas = self._rescaled(u, products)
        elif recipe.memory is not None and recipe.memory.add is not None and terms:
            terms, p, q, products, gammas = self._with_memory(terms, recipe.memory, limit)
        directions: Directions = []
        for block, own in terms:
            seen = products if blocks.on_host else sums.on(products, block.params[0].device)
            directions.append((block, Direction(own, p, q, seen, gammas, limit)))
        if local is not None:
            directions = local.averaged(blocks, directions, gammas, self.settings.clip_grad_norm)
        if recipe.keeps_first:
            directions = self._prepare(directions, products)
        return directions

    def _terms(self, vectors: Sequence[int]) -> list[tuple[ParameterBlock, list[TensorList]]]:
        return [(block, list(map(block.grads.__getitem__, vectors))) for block in self.blocks.all]

    def _rescaled(self, u: Sequence[PerGroup], products: Products) -> tuple[Rows, Rows, Products, list[float]]:
        """Return u scaled to the length of g0, as p, q, products and γ of a direction."""
        square = sum(scalars.columns(products)[0])
        wanted = self._wanted_square * self.coefficients.weights.get(0, 1.0) ** 2
        none = [0.0] * len(u[0])
        kappa = scalars.length_ratio(wanted, square)
        return [none] * len(u), list(map(list, u)), scalars.given(kappa, wanted, len(none)), none

    def _with_memory(
        self, terms: list[tuple[ParameterBlock, list[TensorList]]], memory: Memory, limit: float | None
    ) -> tuple[list[tuple[ParameterBlock, list[TensorList]]], Rows, Rows, Products, list[float]]:
        """Return g + α ‖g‖/‖m‖ m, with the memory m, as terms, p, q, products and γ of a direction."""
        add, state = self.coefficients.add, self._base.state
        none, one = [0.0] * len(add), [1.0] * len(add)
        terms = [(block, [*own, stored.of_block(block, (memory.name,), state).values]) for block, own in terms]
        uu, um, mm = scalars.columns(self.blocks.inner_products(terms, [one, none], [none, one]))
        kappa = scalars.length_ratio(sum(uu), sum(mm))
        square: Scalar = 1.0
        if limit is not None:
            rows = zip(uu, um, mm, add, strict=True)
            square = sum(a + 2.0 * x * kappa * b + (x * kappa) ** 2 * c for a, b, c, x in rows)
        return terms, [one, none], [none, add], scalars.given(kappa, square, len(add)), none

    def _prepare(self, directions: Directions, products: Products | None) -> Directions:
        """Compute the follow-up of the update before the base optimizer gets the gradients, which it may overwrite.

        Args:
            directions: the directions for the base optimizer.
            products: products of the newest gradient and g0, if the memory is orthogonal.
        """
        recipe, last = self.recipe, self.recipe.vectors - 1
        memory = recipe.memory
        if recipe.after is not None:
            self._rates = [_rate(group, recipe.name) for group in self._base.param_groups]
            if not all(map(fused, members(self._base))):
                return [(block, replace(d, terms=[_copied(block, x) for x in d.terms])) for block, d in directions]
        if memory is None:
            return directions
        blocks = [block for block in self.blocks.all if block.perturbed or memory.orthogonal]
        if memory.orthogonal and products is not None:
            none, one = ([x] * len(self.coefficients.gamma) for x in (0.0, 1.0))
            uu, um, mm = map(sum, scalars.columns(products))
            along = scalars.given(scalars.ratio(um, mm), 1.0, len(one))
            for block, own in self._terms([0, last]):
                seen = sums.on(along, block.params[0].device)
                d = Direction(own, [none, one], [[-1.0] * len(one), none], seen, none)
                block.backend.direction(_unmoved(block), d, own[0])
            self._drop_rounding(uu)
        self._next_memory = [(block, block.grads[0]) for block in blocks]
        if last == 0:  # the base optimizer gets these gradients
            self._next_memory = [(block, _copied(block, block.grads[0])) for block in blocks]
        if self._local is not None:
            place = {owner: x for block, xs in self._next_memory for owner, x in zip(block.owners, xs, strict=True)}
            self._local.average([place[param] for param in self.blocks.params if param in place])
        return directions

    def _drop_rounding(self, square: Scalar) -> None:
        """Replace m by 0 if ‖m‖ ≤ 16 ε ‖g‖, which is rounding, because m will be divided by its norm.

        Args:
            square: ‖g‖², of the gradient g that m is a part of. ε is that of the type in which both were computed.
        """
        blocks = self.blocks
        is_double = all(block.params[0].dtype == torch.float64 for block in blocks.all)
        least = square * (16.0 * torch.finfo(torch.float64 if is_double else torch.float32).eps) ** 2
        found = blocks.square_norm(0, whole=True)
        if not isinstance(found, Tensor):
            if found <= least:
                for block in blocks.all:
                    torch._foreach_zero_(list(block.grads[0]))
            return
        for block in blocks.all:
            torch._foreach_mul_(list(block.grads[0]), sums.on(found > least, block.params[0].device))

    def end(self, left_alone: Sequence[Tensor]) -> None:
        """Apply the follow-up of the base optimizer's step, and update the memory for the next step.

        Args:
            left_alone: the parameters that hooks have removed from the step.
        """
        recipe = self.recipe
        if recipe.after is not None:
            steps = [-rate * x for rate, x in zip(self._rates, self.coefficients.after, strict=True)]
            weight = self.coefficients.weights.get(0, 1.0)
            for block in self.blocks.all:
                first, newest = block.grads[0], block.grads[recipe.vectors - 1]
                if weight != 1.0:
                    torch._foreach_mul_(list(first), weight)
                if not block.saved:
                    block.backup = self.blocks.allocate_backup(block)
                square = sums.on(self.squares[-1], block.params[0].device)  # of no effect at a radius of 0
                block.backend.perturb(
                    block, newest, first, [0.0] * len(steps), square, from_start=False, multiple=steps
                )
                if left_alone:
                    triples = zip(block.owners, block.params, block.backup, strict=True)
                    for param, theta in [(p, t) for owner, p, t in triples if any(owner is one for one in left_alone)]:
                        param.copy_(theta)
        for block, values in self._next_memory:
            memory = recipe.memory
            assert memory is not None
            own = stored.of_block(block, (memory.name,), self._base.state)
            new = [] if memory.orthogonal else own.new
            if memory.update is not None and recipe.vectors > 1 and len(new) < len(values):
                k, l = self.coefficients.update  # noqa: E741
                first = [values[i] for i in new]
                block.backend.direction(_unmoved(block), Direction([own.values, values], [k, l]), own.values)
                if first:
                    torch._foreach_copy_([own.values[i] for i in new], first)
            else:
                _copy(block, values, own.values)
            stored.put(block, memory.name, own, self._base.state)
        self._next_memory = []  # the loop's variable would keep it alive
        if self._local is None and self.settings.difference is not None:
            self._keep_length(self._relative_change())

    def _relative_change(self) -> float | None:
        """Return ‖g1 − g0‖/‖g0‖ if it is known; wait for an accelerator."""
        if len(self.squares) < 2:
            return None
        before, change = map(float, self.squares[:2])
        return math.sqrt(change / before) if before > 0.0 and change >= 0.0 else math.nan

    def _keep_length(self, change: float | None) -> None:
        if change is not None and self.settings.difference is not None:
            self.kept.update(self.settings.difference.after(change))

    def _unscale(self, vectors: Sequence[int], scale: LossScale | GivenScale) -> None:
        """Remove the loss scaling from vectors, once."""
        due = [k for k in vectors if k not in self._unscaled]
        self._unscaled.update(due)
        if 0 in due:
            self.first_square = None
        for block in self.blocks.all:
            inverse = scale.inverse(block.params[0].device)
            for k in due:
                torch._foreach_mul_(list(block.grads[k]), inverse)


def _rate(group: Mapping[str, Any], name: str) -> float:
    """Return the learning rate of a group.

    Raises:
        TypeError: it is not a number.
    """
    rate = group.get("lr")
    if not isinstance(rate, int | float | Tensor):
        raise TypeError(
            f"{name} with decouple=True applies the sharpness by the learning rate of the base optimizer, but lr of "
            f"a parameter group is {rate!r}: pass decouple=False"
        )
    return float(rate)


def _copied(block: ParameterBlock, tensors: TensorList) -> TensorList:
    """Return copies of the tensors."""
    if block.vectors is not None:
        return [x.clone(memory_format=torch.preserve_format) for x in tensors]
    out = block.backend.allocate(block.params)
    _copy(block, tensors, out)
    return out


def _copy(block: ParameterBlock, tensors: TensorList, out: TensorList) -> None:
    ones = [1.0] * (max(block.group) + 1)
    block.backend.direction(_unmoved(block), Direction([tensors], [ones]), out)


def _unmoved(block: ParameterBlock) -> Block:
    """Return a block for a primitive that must not move the parameters."""
    return replace(block, backup=[], saved=False, ticket=None)
