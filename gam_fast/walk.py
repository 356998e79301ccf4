"""One step in progress: the passes, the three buffers, and the way back.

Notation: g0 … g3 are the gradients of the passes, θ the parameters at the start, u and m the two combinations of
:mod:`gam_fast.recipes`. Only the backup of θ and at most two vectors are held besides the newest. A recipe of second
order counts its Hessian-vector products among the vectors, each after the gradient it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from . import hvp, scalars
from .backends.base import Backend, Direction, FoldInto, Leaves, Products, Scalar, TensorList
from .backends.scalars import steps
from .batchnorm import FreezeRunningStatistics
from .ownership import as_dtype, is_alike, is_large_on_cpu, take, take_sole
from .recipes import Move, Recipe, fold_plan
from .rng import ReplayRNG


class NonFiniteGradientError(FloatingPointError):
    """A pass gave a gradient with NaN or infinity; the step was undone."""


class SkipStep(Exception):
    """Leaves a :class:`Walk` and undoes the step without an error to the user."""


@dataclass(frozen=True)
class Settings:
    """What the engine asks of every walk."""

    recipe: Recipe
    select: Callable[[torch.device], Backend]
    model: nn.Module | None = None
    replay_rng: bool = True
    freeze_running_statistics: bool = True
    clip_grad_norm: float | None = None
    on_nonfinite: str = "raise"


@dataclass(eq=False)
class Shard:
    """The leaves of one device, and the gradients being held for them, by pass."""

    backend: Backend
    leaves: Leaves = field(default_factory=Leaves)
    grads: dict[int, TensorList] = field(default_factory=dict)


Finish: TypeAlias = Callable[["list[tuple[Shard, Direction]]"], None]


class Walk:
    """Context manager of one step; leaving it by an exception undoes the step.

    Args:
        settings: what the optimizer was constructed with.
        groups: the parameter groups.
        hyper: the recipe's hyper-parameters, by group.
    """

    def __init__(self, settings: Settings, groups: Sequence[dict[str, Any]], hyper: Sequence[dict[str, Any]]) -> None:
        self.settings = settings
        self.recipe = recipe = settings.recipe
        self.groups = groups
        self.hyper = hyper
        self.plan = fold_plan(recipe)
        coefficients = [recipe.coefficients(h) for h in hyper]
        self.gamma = [gamma for _, _, gamma in coefficients]
        # A base optimizer with maximize=True ascends L, that is, descends −L, whose gradients point the other way. The
        # norm of a gradient is the same for both, and so is its own gradient, a Hessian-vector product.
        self.sign = [-1.0 if group.get("maximize", False) else 1.0 for group in groups]
        signs = [self.sign if recipe.is_product(i) else [1.0] * len(groups) for i in range(recipe.vectors)]
        self.c = [
            [s * c[i] for s, (c, _, _) in zip(signs[i], coefficients, strict=True)] for i in range(recipe.vectors)
        ]
        self.d = [
            [s * d[i] if d else 0.0 for s, (_, d, _) in zip(signs[i], coefficients, strict=True)]
            for i in range(recipe.vectors)
        ]
        self.params = [(param, g) for g, group in enumerate(groups) for param in group["params"]]
        self.shards: dict[torch.device, Shard] = {}
        self.active: dict[Tensor, Shard] = {}
        self.complete = False
        self.finished = False
        self._losses: list[Tensor] = []
        self._over = False
        self._newest = -1  # the index of the vector made last
        self._on_host = all(scalars.reads_are_free(param.device) for param, _ in self.params)
        self._totals: list[Scalar | Products] = []
        self._known_finite: set[int] = set()
        self._spare: dict[Tensor, Tensor] = {}
        self._versions: list[int] = []
        self._grad_enabled = True
        self._begun = False
        self._rng: ReplayRNG | None = None
        self._statistics = FreezeRunningStatistics(settings.model if settings.freeze_running_statistics else None)

    def __enter__(self) -> Walk:
        self._grad_enabled = torch.is_grad_enabled()
        return self  # what has to be undone begins in begin(), when a Ctrl-C already leads to __exit__

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        # Once the update is done the step stands, whatever a hook raises afterwards.
        undo = None if self.finished else kind
        # A Ctrl-C inside torch.no_grad() itself, here or before, would leave gradients switched off.
        # (Not so when a loop was left early, perhaps long ago and by the garbage collector: GeneratorExit.)
        stays = kind is None or issubclass(kind, GeneratorExit)
        grad_enabled = torch.is_grad_enabled() if stays else self._grad_enabled
        try:
            if undo is not None:
                self.restore()
        finally:
            try:
                self._statistics.__exit__(undo, value, traceback)
                if self._rng is not None:
                    self._rng.__exit__(undo, value, traceback)
            finally:
                torch.set_grad_enabled(grad_enabled)
                self._over = True
                self._losses.clear()
                self.shards.clear()
                self.active.clear()
                self._spare.clear()
        return kind is not None and issubclass(kind, SkipStep)

    @torch.no_grad()
    def restore(self) -> None:
        """Put θ back, bit for bit."""
        for shard in self.shards.values():
            leaves = shard.leaves
            del leaves.backup[len(leaves.params) :], leaves.group[len(leaves.params) :]  # of an interrupted _activate
            shard.backend.restore(leaves)

    def begin(self) -> None:
        """Before a pass: no gradients, the same random numbers, and the parameters' versions noted.

        On a CPU, the memory of large gradients of the step before is kept for the backup: fresh memory would have to be
        paged in, which takes as long as the whole step. It would be taken up after the first pass at the latest, so the
        peak of a step does not grow.
        """
        if not self._begun:
            self._check_capture()
            self._begun = True
            if self.settings.replay_rng:
                self._rng = ReplayRNG({param.device for param, _ in self.params})
                self._rng.__enter__()
            self._statistics.__enter__()
        recycle = self.recipe.passes > 1 and not self.active
        for param, _ in self.params:
            if recycle and param.grad is not None and is_large_on_cpu(param):
                spare = take_sole(param)
                if spare is not None and is_alike(spare, param):
                    self._spare[param] = spare
            param.grad = None
        if self._rng is not None:
            self._rng.begin()
        self._statistics.begin()
        self._versions = [param._version for param, _ in self.params]

    def _check_capture(self) -> None:
        """Raises RuntimeError where a CUDA graph is being captured that could not repeat the step."""
        if self.settings.on_nonfinite == "ignore" or not any(param.is_cuda for param, _ in self.params):
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"on_nonfinite={self.settings.on_nonfinite!r} looks at the norms of a step, which a CUDA graph cannot: "
                "construct the optimizer with on_nonfinite='ignore' to capture it"
            )

    def backward(self, loss: Tensor) -> None:
        """What :meth:`gam_fast.turn.Turn.backward` does."""
        if self.recipe.second_order:
            if self.complete or not self._begun or self._over:
                raise RuntimeError(
                    f"turn.backward(loss) outside the pass of {self.recipe.name} that the turn belongs to"
                )
            self._losses.append(hvp.check_loss(loss, self.recipe.name))
        else:
            loss.backward()

    @torch.no_grad()
    def collect(self) -> None:
        """After a pass: take its gradient in, and the Hessian-vector product that the recipe makes of it.

        Raises:
            RuntimeError: no parameter has a gradient, a parameter was written to during the pass, or, for a recipe of
                second order, there is no loss, or backward was called on it.
            SecondDerivativeError: a loss that cannot be differentiated twice.
            TypeError: a sparse gradient.
        """
        index = self._newest + 1
        graph = self._differentiate(index) if self.recipe.second_order else []
        if not self.recipe.has_product(index):
            graph.clear()
        self._take_in(index)
        if graph:
            self._multiply(index, graph)

    def _differentiate(self, index: int) -> list[Tensor | None]:
        """The gradient of the losses handed over, into ``param.grad``; as it can be differentiated again, for all."""
        losses, self._losses = self._losses, []
        called = any(param.grad is not None for param, _ in self.params)
        if called or not losses:
            wrong = "backward() was called in it" if called else "it ended without a loss"
            name = self.recipe.name
            raise RuntimeError(
                f"pass {self.recipe.pass_of(index)} of {name}: {wrong}. {name} differentiates the loss itself, twice: "
                f"{hvp.HOW_TO_GIVE_A_LOSS}"
            )
        twice = self.recipe.has_product(index)
        params = [param for param, _ in self.params if param.requires_grad]
        if not params:
            raise RuntimeError(
                f"no parameter of this {self.recipe.name} requires a gradient: there is nothing to optimize"
            )
        found = dict(zip(params, hvp.gradient(losses, params, twice=twice), strict=True))
        for param, grad in found.items():
            param.grad = None if grad is None else as_dtype(grad.detach(), param.dtype)
        return [found.get(param) for param, _ in self.params]

    def _multiply(self, index: int, graph: list[Tensor | None]) -> None:
        """The Hessian times the gradient of vector ``index``, scaled to length 1, becomes the next vector.

        Scaled before and not after, so that a half-precision backward neither overflows nor underflows, whatever the
        scale of the loss.
        """
        shards = list(self.shards.values())
        squares = [shard.backend.square_norm(shard.leaves, shard.grads[index]) for shard in shards]
        total = scalars.square_norm(squares, self._on_host)
        self._check_finite(total, {index})
        units: dict[Tensor, Tensor] = {}
        for shard in shards:
            scale = steps([1.0], scalars.on(total, shard.leaves.params[0].device))[0]
            units.update(zip(shard.leaves.params, hvp.scaled(shard.grads[index], scale), strict=True))
        pairs = [(param, grad) for (param, _), grad in zip(self.params, graph, strict=True) if grad is not None]
        params = [param for param, _ in pairs]
        edges = hvp.edges([grad for _, grad in pairs])
        pairs.clear()
        graph.clear()
        keep = index in self.plan[index][1]
        if not keep:  # its memory is free from here on: of the graph, only the edges are held
            self._drop(index)
        products = hvp.product(edges, params, [units[param] for param in params])
        edges.clear()
        units.clear()
        for shard in shards if keep else ():
            shard.grads[index].clear()  # a reference less, so that they can be taken over
            shard.grads[index] = [
                torch.zeros_like(param) if param.grad is None else take(param) for param in shard.leaves.params
            ]
        for param, value in zip(params, products, strict=True):
            param.grad = torch.zeros_like(param) if value is None else as_dtype(value, param.dtype)
        products.clear()
        self._take_in(index + 1)

    def _drop(self, index: int) -> None:
        for shard in self.shards.values():
            del shard.grads[index]
        for param, _ in self.params:
            param.grad = None

    def _take_in(self, index: int) -> None:
        """What is in ``param.grad`` becomes vector ``index``."""
        versions = self._versions or [param._version for param, _ in self.params]
        for (param, group), version in zip(self.params, versions, strict=True):
            if param._version != version:
                raise RuntimeError(
                    f"{self._name(param, group)} was modified during pass {self.recipe.pass_of(index)} of "
                    f"{self.recipe.name}; parameters must stay as the optimizer set them until the step is over"
                )
            if param.grad is not None:
                self._check_gradient(param, group)
                if param not in self.active:
                    self._activate(param, group)
        if not any(param.grad is not None for param in self.active):
            mend = (
                "call backward() on the loss in every pass (in the closure, or in the body of the loop over passes())"
            )
            if self.recipe.second_order:
                mend = "the loss does not depend on the parameters of this optimizer"
            raise RuntimeError(
                f"pass {self.recipe.pass_of(index)} of {self.recipe.name} ended without a gradient for any parameter: "
                f"{mend}"
            )
        last = index == self.recipe.vectors - 1
        keep = not last and index in self.plan[index][1] and not self.recipe.has_product(index)
        for shard in self.shards.values():
            missing = [param.grad is None for param in shard.leaves.params]
            shard.grads[index] = [
                torch.zeros_like(param) if absent else as_dtype(take(param) if keep else _gradient(param), param.dtype)
                for param, absent in zip(shard.leaves.params, missing, strict=True)
            ]
        self._newest = index

    @torch.no_grad()
    def move(self) -> None:
        """From the pass just made to the next point of the walk, and fold what is no longer needed."""
        index = self._newest
        move = self.recipe.walk[index]
        assert isinstance(move, Move)
        folds, live = self.plan[index]
        eta = [float(h[self.recipe.adaptive]) for h in self.hyper] if self.recipe.adaptive else None
        minus = move.minus
        shards = list(self.shards.values())
        total = scalars.square_norm(
            [
                s.backend.square_norm(s.leaves, s.grads[move.along], None if minus is None else s.grads[minus], eta)
                for s in shards
            ],
            self._on_host,
        )
        self._check_finite(total, {move.along} if minus is None else {move.along, minus})
        sign = [1.0] * len(self.groups) if self.recipe.is_product(move.along) else self.sign
        radius = [s * float(h[move.radius]) for s, h in zip(sign, self.hyper, strict=True)]
        for shard in shards:
            if not shard.leaves.saved:
                shard.leaves.backup = self._allocate_backup(shard)
            into = []
            for fold in folds:
                part = self.c if fold.part == "u" else self.d
                into.append(
                    FoldInto(shard.grads[fold.into], shard.grads[fold.other], part[fold.into], part[fold.other])
                )
            shard.backend.perturb(
                shard.leaves,
                shard.grads[move.along],
                None if minus is None else shard.grads[minus],
                radius,
                scalars.on(total, shard.leaves.params[0].device),
                from_start=move.from_start,
                eta=eta,
                folds=into,
            )
            for k in set(shard.grads) - set(live):
                del shard.grads[k]
        for fold in folds:
            (self.c if fold.part == "u" else self.d)[fold.into] = [1.0] * len(self.groups)

    @torch.no_grad()
    def finish(self, update: Finish) -> None:
        """After the last pass: the direction of every shard, to ``update``, which restores θ and takes the step."""
        last = self.recipe.vectors - 1
        gradients = [*(self.plan[-1][1] if self.plan else ()), last]
        projected = bool(self.recipe.m)
        c = [self.c[k] for k in gradients]
        d = [self.d[k] for k in gradients]
        q: list[list[float]] | None = None
        products: Products | None = None
        if projected or self.settings.clip_grad_norm is not None or self.settings.on_nonfinite != "ignore":
            products = scalars.inner_products(
                [
                    shard.backend.inner_products(
                        shard.leaves,
                        Direction([shard.grads[k] for k in gradients], list(c)),
                        Direction([shard.grads[k] for k in gradients], list(d)) if projected else None,
                        len(self.groups),
                    )
                    for shard in self.shards.values()
                ],
                self._on_host,
            )
            self._check_finite(products, set(gradients))
        if projected:
            # u − γ (m − κ u) = Σ (c − γ d) X + κ Σ γ c X
            q = [[gamma * x for gamma, x in zip(self.gamma, row, strict=True)] for row in c]
            c = [
                [x - gamma * y for gamma, x, y in zip(self.gamma, cs, ds, strict=True)]
                for cs, ds in zip(c, d, strict=True)
            ]
        directions = []
        for device, shard in self.shards.items():
            terms = [shard.grads[k] for k in gradients]
            seen = None if products is None else scalars.products_on(products, device)
            directions.append((shard, Direction(terms, c, q, seen, self.gamma, self.settings.clip_grad_norm)))
        update(directions)
        self.finished = True
        if self.recipe.second_order:  # what is there is no gradient of the loss
            for param, _ in self.params:
                param.grad = None

    def _check_finite(self, total: Scalar | Products, vectors: set[int]) -> None:
        """Undo the step when a vector is not finite. A CPU looks at once, an accelerator after the last pass only."""
        if self.settings.on_nonfinite == "ignore":
            return
        self._totals.append(total)
        if not self._on_host and self._newest < self.recipe.vectors - 1:
            return
        if scalars.is_finite(self._totals):
            self._known_finite |= vectors
            return
        if self.settings.on_nonfinite == "skip":
            raise SkipStep
        suspects = sorted({str(self.recipe.pass_of(vector)) for vector in vectors - self._known_finite})
        where = f"pass {' or '.join(suspects)}" if self._on_host else "a pass"
        raise NonFiniteGradientError(
            f"{where} of {self.recipe.name} gave a gradient that is not finite; parameters, running statistics and "
            "random state are as before the step. on_nonfinite='skip' goes on with the next batch instead"
        )

    def _allocate_backup(self, shard: Shard) -> TensorList:
        params = shard.leaves.params
        fresh = iter(shard.backend.allocate([param for param in params if param not in self._spare]))
        return [self._spare.pop(param) if param in self._spare else next(fresh) for param in params]

    def _activate(self, param: Tensor, group: int) -> None:
        """Let a parameter take part from now on; in the passes before, its gradient counts as zero."""
        shard = self.shards.get(param.device)
        if shard is None:
            held = next(iter(self.shards.values())).grads if self.shards else {}
            shard = Shard(self.settings.select(param.device), grads={k: [] for k in held})
            self.shards[param.device] = shard
        if shard.leaves.saved:
            shard.leaves.backup.append(param.clone(memory_format=torch.preserve_format))
        shard.leaves.group.append(group)
        shard.leaves.params.append(param)
        for grads in shard.grads.values():
            grads.append(torch.zeros_like(param))
        self.active[param] = shard

    def _check_gradient(self, param: Tensor, group: int) -> None:
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise TypeError(
                f"{self._name(param, group)} has a gradient of layout {grad.layout}; {self.recipe.name} needs dense "
                "gradients: construct the module with sparse=False"
            )

    def _name(self, param: Tensor, group: int) -> str:
        position = next(i for i, other in enumerate(self.groups[group]["params"]) if other is param)
        names = self.groups[group].get("param_names")
        called = f" ({names[position]})" if names else ""
        return f"parameter {position} of group {group}{called}, of shape {tuple(param.shape)},"


def _gradient(param: Tensor) -> Tensor:
    """The gradient, to be read until the next pass."""
    assert param.grad is not None
    return param.grad
