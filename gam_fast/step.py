"""One step in progress: the passes, the three buffers, and the way back.

Notation: g0 … g3 are the gradients of the passes, θ the parameters at the start, u and m the two combinations of
:mod:`gam_fast.recipes`. Only the backup of θ and at most two vectors are held besides the newest. A recipe of second
order counts its Hessian-vector products among the vectors, each after the gradient it is made of.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import hvp, sums
from .amp import GivenScale, LossScale
from .backends.base import Direction, FoldInto, Products, Scalar
from .buffers import ForwardState
from .capture import is_capturing
from .distributed import mean_over_processes, reshard, without_last_sync
from .finite import FiniteWatch, SkipStep
from .local_step import LocalSync
from .models import OtherGradients
from .ownership import has_gradient
from .parameters import ParameterBlock, StepParameters, clear_weight_caches
from .recipes import Coefficients, Perturbation
from .rng import ReplayRNG
from .settings import Settings
from .turn import Portion, Turn, some

_RATE_OF = operator.methodcaller("get", "lr")

Finish: TypeAlias = Callable[["list[tuple[ParameterBlock, Direction]]"], None]


class Step:
    """The state of one step.

    Args:
        settings: what the optimizer was constructed with.
        groups: the parameter groups.
        coefficients: those of the recipe.
        participants: the parameters.
        scale: the loss scaling of this step.
        by_loop: whether a loop over ``passes()`` drives it, and not a closure.
    """

    def __init__(
        self,
        settings: Settings,
        groups: Sequence[dict[str, Any]],
        coefficients: Coefficients,
        participants: StepParameters,
        scale: LossScale | GivenScale | None = None,
        *,
        by_loop: bool = False,
    ) -> None:
        self.settings = settings
        self.recipe = recipe = settings.recipe
        self.groups = groups
        self.plan = recipe.plan
        self.coefficients = coefficients
        self.portion = Portion(settings.ascent_share)
        self.blocks = participants
        self.params = self.blocks.params
        self.by_loop = by_loop
        self.complete = False
        self.finished = False
        self.rates_moved = False
        self._losses: list[Tensor] = []
        self.over = False
        """True once the step was taken or undone."""
        self._newest = -1  # the index of the vector made last
        self.at_end = False
        """True once the last pass was made."""
        self._device = self.params[0].device if self.params else torch.device("cpu")
        self._local: LocalSync | None = None
        if settings.sync == "local" and LocalSync.is_needed():
            if self.blocks.sharded:
                raise TypeError(
                    "sync='local' with sharded parameters: no process has a gradient of its own for all of them; use "
                    "sync='global'"
                )
            self._local = LocalSync(settings.model, self._device, recipe.name)
        self.watch = FiniteWatch(
            recipe, settings.on_nonfinite, self._device, on_host=self.blocks.on_host, at_end=self._local is not None
        )
        if scale is not None:
            self.watch.use(scale)
        self._micro_batches: list[Any] | None = None
        self._first_square: Scalar | None = None  # ‖g0‖², where it is known
        self._squares: list[Scalar] = []  # of the lengths that the moves are divided by
        self.relative_change: float | None = None
        """‖g1 − g0‖/‖g0‖, once the step was taken, where that is wanted."""
        self.current: Turn | None = None
        """The pass that is under way."""
        self.may_communicate = True
        """Whether leaving the step may wait for other processes: not in the garbage collector."""
        self.owed: Callable[[], None] | None = None
        """What other processes have to be told before anything else."""
        self._on_exit: contextlib.ExitStack | None = None
        self._grad_enabled = torch.is_grad_enabled()
        self._begun = False
        self._rng: ReplayRNG | None = None
        self.state = settings.forward_state or ForwardState()
        if settings.model is not None:
            self.blocks.named = settings.model.named_parameters()
        self._rates: list[Any] | None = None  # after the first of several passes
        self._others = OtherGradients(settings.others, self.params)

    def leave(self, error: BaseException | None) -> bool:
        """End the step, or undo it because of ``error``, once. Return True if the error asks to skip the step."""
        if self.over:
            return False
        # Once the update is done the step stands, whatever a hook raises afterwards.
        undo = None if error is None or self.finished else type(error)
        # A Ctrl-C inside no_grad() or set_grad_enabled() itself, here or before, would leave gradients switched off.
        # (Not so when a loop was left early, perhaps long ago and by the garbage collector: GeneratorExit.)
        stays = error is None or isinstance(error, GeneratorExit)
        grad_enabled = torch.is_grad_enabled() if stays else self._grad_enabled
        try:
            if undo is not None:
                self.restore()
        finally:
            try:
                self._others.close(undone=undo is not None)
                self.state.exit(undo=undo is not None)
                if self._rng is not None:
                    self._rng.__exit__(undo, error, None)
            finally:
                torch._C._set_grad_enabled(grad_enabled)
                self.over = True
                self.current = None  # which refers to this object
                clear_weight_caches()
                self._losses.clear()
                self._micro_batches = None
                self.blocks.release(undone=undo is not None)
                if self._on_exit is not None:
                    self._on_exit.close()
                if undo is not None:
                    self._tell()
        return isinstance(error, SkipStep)

    def _tell(self) -> None:
        """The step was undone: of what was gathered nothing is kept, and the other processes are told."""
        reshard(self.settings.model)
        if self._local is not None and self._begun:
            self.owed = partial(self._local.give_up, len(self.params))
            if self.may_communicate:
                owed, self.owed = self.owed, None
                # an error of the network would hide the one that the step is left by
                with contextlib.suppress(RuntimeError):
                    owed()

    @torch.no_grad()
    def restore(self) -> None:
        """Put θ back, bit for bit."""
        self.blocks.restore()

    @property
    def under_way(self) -> bool:
        """Whether a pass was begun, and the step neither taken nor undone."""
        return self._begun and not self.over

    @property
    def perturbed(self) -> bool:
        """Whether a pass is under way whose weights are not those of the model."""
        return self.under_way and not self.complete and any(block.leaves.saved for block in self.blocks.all)

    @property
    def in_last_pass(self) -> bool:
        """Whether the last pass is under way."""
        return self._begun and not self.complete and self._passes_left() == 1

    @property
    def has_gradient(self) -> bool:
        """Whether backward was called in the pass that is under way."""
        return bool(self._losses) or any(map(has_gradient, self.params))

    def _passes_left(self) -> int:
        return self.recipe.passes - self.recipe.passes_before[self._newest + 1]

    def begin(self, index: int) -> Turn:
        """Begin a pass, the ``index``-th: no gradients, the same random numbers, and the parameters' versions noted.

        On a CPU, the memory of large gradients of the step before is kept for the backup: fresh memory would have to be
        paged in, which takes as long as the whole step. It would be taken up after the first pass at the latest, so the
        peak of a step does not grow.
        """
        if not self._begun:
            several, capturing = self.recipe.passes > 1, not self.blocks.on_host and is_capturing(self.blocks.devices)
            if capturing:
                self.settings.check_capture(self.blocks.devices)
            self._begun = True
            if self.settings.replay_rng is not None:
                self._rng = self.settings.replay_rng
                self._rng.start(self.blocks.devices, several=several, capturing=capturing)
            if self.settings.freeze_running_statistics:
                given = self.settings.model, self.params, self.blocks.flags, self.settings.moving_buffers
                gradient = not self.recipe.second_order
                self.state.enter(*given, several=several, by_gradient=gradient, capturing=capturing)
            if self._local is not None:
                self._when_left(self._local.close)
                self._local.begin()
                self.state.start_anew()  # from those of rank 0
        clear_weight_caches()
        blocks, state, portion = self.blocks, self.state, self.portion
        # whether passes see parts of the batch, as known by now: the last is then the one that counts
        is_cut = portion.share < 1.0 and portion.asked
        if self._rng is not None:
            self._rng.begin(keep_last=is_cut)
        if blocks.moved:
            state.add(blocks.moved)
        if state.active:
            state.begin(keep_last=is_cut)
        if self._others.params or index == 0:
            self._others.begin(keep_last=is_cut)
        if portion.asked:
            portion.begin()
        blocks.begin_pass(recycle=self.recipe.passes > 1, each=state.active and state.moves_parameters)
        left = self.recipe.passes - self.recipe.passes_before[self._newest + 1]
        self.current = Turn(index, index + left, 1.0 if left == 1 else portion.share, self.backward, portion)
        return self.current

    def unscale_by(self, scale: GivenScale) -> None:
        """``scaler.step(optimizer)`` was called in the last pass, or after it; whoever did will update the scaler.

        Raises:
            RuntimeError: the scaler has unscaled the gradients of one of several passes; a local step, one of second
                order, or one that decides by its first gradient.
        """
        if self._local is not None or self.recipe.second_order:
            what = f"of {self.recipe.name}" if self.recipe.second_order else "with sync='local'"
            raise RuntimeError(
                f"scaler.step(optimizer) in a step {what}: torch looks at the gradients of one pass on one process. "
                "Leave scaler.step and scaler.update out, and call passes(scaler=scaler)"
            )
        if self.settings.goes_on is not None:
            raise RuntimeError(
                "scaler.step(optimizer) in a step with a rule WhenSteep, which looks at the first gradient before the "
                "scale is known: leave scaler.step and scaler.update out, and call passes(scaler=scaler)"
            )
        if scale.unscaled and self.recipe.passes > 1:
            raise RuntimeError(
                f"scaler.unscale_ was called for one pass of {self.recipe.name}, and the gradients of the others are "
                "scaled: leave it out; to clip, construct the optimizer with clip_grad_norm="
            )
        self.watch.use(scale)

    def micro_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """See :meth:`gam_fast.optimizer.SharpnessAwareOptimizer.micro_batches`."""
        if self._micro_batches is None:
            if self.recipe.passes == 1:  # no other pass will ask for them
                return self._until_end(self.portion.stream(batches))
            with self._rng.reading() if self._rng is not None else contextlib.nullcontext():
                self._micro_batches = list(some(batches))
        elif self._rng is not None:
            self._rng.skip_reading()
        share = 1.0 if self.in_last_pass else self.portion.share
        return self._until_end(self.portion.batches(self._micro_batches, share))

    def _until_end(self, batches: Iterable[Any]) -> Iterator[Any]:
        found = without_last_sync(self.settings.model, batches)
        self._when_left(found.close)  # its no_sync() ends with the step, however that ends
        return found

    def _when_left(self, call: Callable[[], object]) -> None:
        self._on_exit = self._on_exit or contextlib.ExitStack()
        self._on_exit.callback(call)

    def backward(self, loss: Tensor) -> None:
        """See :meth:`gam_fast.turn.Turn.backward`."""
        if self.recipe.second_order:
            if self.complete or not self._begun or self.over:
                raise RuntimeError(
                    f"turn.backward(loss) outside the pass of {self.recipe.name} that the turn belongs to"
                )
            hvp.check_loss(loss, self.recipe.name)
        scaled = loss if self.watch.scale is None else self.watch.scale.scale(loss)
        if self.recipe.second_order:
            self._losses.append(scaled)
        else:
            scaled.backward()

    def advance(self) -> None:
        """After a pass: take its gradient in, and go to the next point of the path, if there is one.

        Raises:
            RuntimeError: no parameter has a gradient, a parameter was written to during the pass, or, for a recipe of
                second order, there is no loss, or backward was called on it.
            SecondDerivativeError: a loss that cannot be differentiated twice.
            TypeError: a sparse gradient.
            NonFiniteGradientError, SkipStep: a gradient on the way is not finite.
        """
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # a tenth of the time of a context manager
        try:
            index, recipe = self._newest + 1, self.recipe
            if index == 0 and self.state.active and (written := self.state.look()) and recipe.passes > 1:
                self.blocks.refuse_write(written[0], f"pass 0 of {recipe.name}")
            if self.watch.scale is not None:
                self.watch.scale.check_pass(f"pass {recipe.passes_before[index]} of {recipe.name}")
            graph = self._differentiate(index) if recipe.second_order else []
            if not self.blocks.take_all(index, keep=recipe.keeps[index]):
                self._take_in(index)
            self._newest, self.at_end = index, index == recipe.vectors - 1
            if self.portion.weight != 1.0:
                self._weigh(index, self.portion.weight, of_product=bool(graph))
            if index == 0 and not self.at_end and self.settings.goes_on is not None and not self._goes_on():
                graph.clear()
                self._stay()
            if graph:
                self._multiply(index, graph)
            if self._rng is not None:
                self._rng.end(goes_on=not self.at_end)
            if not self.at_end:
                if self._rates is None:
                    self._rates = list(map(_RATE_OF, self.groups))
                self._perturb()
        finally:
            torch._C._set_grad_enabled(grad_enabled)

    def _differentiate(self, index: int) -> list[Tensor | None]:
        """Give the parameters their gradients of a loss; return those to be differentiated again."""
        losses, self._losses = self._losses, []
        graph = hvp.differentiate(self.recipe, self.blocks, losses, index)
        return graph if index + 1 in self.recipe.products else []

    def _weigh(self, index: int, weight: float, *, of_product: bool) -> None:
        self.coefficients.weigh(index, weight)
        if of_product:
            self.coefficients.weigh(index + 1, weight)

    def _goes_on(self) -> bool:
        """Ask whether the gradient at θ is such that the path is taken; waits for an accelerator."""
        assert self.settings.goes_on is not None
        self._first_square = self.blocks.square_norm(0)
        square = float(self._first_square) * self.portion.weight**2
        if self.watch.scale is not None:
            square *= float(self.watch.scale.inverse(self._device)) ** 2
        if self._local is not None:
            square = self._local.mean(self.blocks, square)
        else:
            square = mean_over_processes(square, self.settings.model, self._device)
        return self.settings.goes_on(square)

    def _stay(self) -> None:
        """The step becomes one of the base optimizer, with the gradient there is, or with that of the whole batch."""
        self.recipe = self.recipe.plain
        self.plan = self.recipe.plan
        self.coefficients = Coefficients(self.recipe, self.groups, [{} for _ in self.groups])
        self.at_end = True
        if self.portion.share < 1.0 and self.portion.asked:
            self.blocks.drop(0)
            self._newest = -1
            self.at_end = False
        else:
            self.blocks.give_back(0)

    def _multiply(self, index: int, graph: list[Tensor | None]) -> None:
        """The Hessian times the gradient of vector ``index``, scaled to length 1, becomes the next vector."""
        total = self.blocks.square_norm(index)
        self.watch.check(total, {index}, last=False)
        hvp.multiply(self.blocks, index, graph, total, keep=index in self.plan[index][1])
        if not self.blocks.take_all(index + 1, keep=self.recipe.keeps[index + 1]):
            self._take_in(index + 1)
        self._newest, self.at_end = index + 1, index + 1 == self.recipe.vectors - 1

    def _take_in(self, index: int) -> None:
        """Take ``param.grad`` in as vector ``index``, where that is not as it mostly is."""
        mend: str | None = (
            "call backward() on the loss in every pass (in the closure, or in the body of the loop over passes())"
        )
        if self.recipe.second_order:
            mend = "the loss does not depend on the parameters of this optimizer"
        elif self.recipe.passes == 1 and self._local is None:
            mend = None  # as torch's optimizers do nothing then
        keep, where = self.recipe.keeps[index], f"pass {self.recipe.passes_before[index]} of {self.recipe.name}"
        self.blocks.take_in(index, keep=keep, where=where, mend=mend, may_write=self.recipe.passes == 1)

    def _perturb(self) -> None:
        """From the pass just made to the next point of the path, and fold what is no longer needed."""
        index = self._newest
        if index < 0:  # stay at θ
            return
        move = self.recipe.path[index]
        assert isinstance(move, Perturbation)
        fold, live = self.plan[index]
        eta, minus = self.coefficients.eta, move.minus
        known = self._first_square if move.along == 0 and minus is None and eta is None else None
        total = self.blocks.square_norm(move.along, minus, eta) if known is None else known
        self.watch.check(total, {move.along} if minus is None else {move.along, minus}, last=False)
        self._squares.append(total)
        radius = self.coefficients.radius[index]
        for block in self.blocks.all:
            if not block.leaves.saved:
                block.leaves.backup = self.blocks.allocate_backup(block)
            into = None
            if fold is not None:
                part = self.coefficients.u if fold.part == "u" else self.coefficients.m
                into = FoldInto(block.grads[fold.into], block.grads[fold.other], part[fold.into], part[fold.other])
            # to ask a tensor for its device takes a microsecond
            square = total if self.blocks.on_host else sums.on(total, block.leaves.params[0].device)
            block.backend.perturb(
                block.leaves,
                block.grads[move.along],
                None if minus is None else block.grads[minus],
                radius,
                square,
                from_start=move.from_start,
                eta=eta,
                fold=into,
            )
            for k in set(block.grads) - set(live):
                del block.grads[k]
        if fold is not None:
            self.coefficients.folded(fold)

    def finish(self, update: Finish) -> None:
        """After the last pass: the direction of every block, to ``update``, which restores θ and takes the step."""
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            self._finish(update)
        finally:
            torch._C._set_grad_enabled(grad_enabled)

    def _finish(self, update: Finish) -> None:
        self.rates_moved = self._have_rates_moved()
        last = self.recipe.vectors - 1
        gradients = [*(self.plan[-1][1] if self.plan else ()), last]
        if self.watch.scale is not None:
            self._unscale(gradients, self.watch.scale)
        u, m, p, q = self.coefficients.final(gradients)
        gammas, limit = self.coefficients.gamma, self.settings.clip_grad_norm
        terms = [(block, list(map(block.grads.__getitem__, gradients))) for block in self.blocks.all]
        products: Products | None = None
        if terms and (q is not None or limit is not None or self.watch.looks):
            products = self.blocks.inner_products(terms, u, m)
            self.watch.check(products, set(gradients), last=True)
        if self._local is not None:
            if self.settings.measure_change:
                self._measure_change()
            self.relative_change = self._local.agree(self.blocks, self.watch, self.relative_change)
            # where another process has a gradient that this one lacks, there are zeros now
            terms = [(block, list(map(block.grads.__getitem__, gradients))) for block in self.blocks.all]
            limit = None  # what is clipped is the mean
        directions = []
        for block, own in terms:
            seen = products
            if isinstance(products, Tensor):
                seen = sums.products_on(products, block.leaves.params[0].device)
            directions.append((block, Direction(own, p, q, seen, gammas, limit)))
        if self._local is not None:
            ceiling = self.settings.clip_grad_norm
            directions = self._local.averaged(self.blocks, directions, gammas, ceiling)
        if self.state.active:
            self.state.settle()
        update(directions)
        self.finished = True
        if self._others.params:
            self._others.finish()
        if self._local is None and self.settings.measure_change:
            self._measure_change()
        if self.watch.scale is not None:
            self.watch.scale.report(True, self._device)
        if self.recipe.second_order:  # what is there is no gradient of the loss
            self.blocks.clear_gradients()

    def _have_rates_moved(self) -> bool:
        """Return whether somebody has changed a learning rate since the first pass."""
        now = list(map(_RATE_OF, self.groups))
        if self._rates is None or (len(now) == len(self._rates) and all(map(operator.is_, self._rates, now))):
            return False
        pairs = zip(self._rates, now, strict=False)
        return any(isinstance(a, float) and isinstance(b, float) and a != b for a, b in pairs)

    def _measure_change(self) -> None:
        """Waits for an accelerator."""
        if len(self._squares) > 1:
            before, change = map(float, self._squares[:2])
            self.relative_change = math.sqrt(change / before) if before > 0.0 and change >= 0.0 else math.nan

    def _unscale(self, gradients: Sequence[int], scale: LossScale | GivenScale) -> None:
        """Take the loss scaling out of what the direction is combined from."""
        for block in self.blocks.all:
            inverse = scale.inverse(block.leaves.params[0].device)
            for k in gradients:
                torch._foreach_mul_(list(block.grads[k]), inverse)
