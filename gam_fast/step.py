"""One step in progress: its phases, its three buffers, and how it is undone.

A step is in one phase. Loops over ``passes()``, closures and ``step()`` all drive it by the same four methods:

    idle        the step was made; nothing was done yet
    pass        after ``next_pass``, repeatedly; ``current`` is the pass
    complete    after the last pass, by ``next_pass`` or ``advance`` (``advance`` alone uses present gradients)
    updated     after ``finish``: from here on the step stands
    taken       after ``leave`` of an updated step
    undone      after ``leave`` of any other step

:mod:`gam_fast.path` describes the use of the gradients.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import hvp
from .active import StepSchedule
from .amp import GivenScale, LossScale
from .capture import is_capturing
from .coefficients import Coefficients
from .distributed import mean_over_processes, reshard, without_last_sync
from .finite import FiniteWatch, NothingToDo, SkipStep
from .local_step import LocalSync
from .models import OtherGradients
from .options import Settings
from .ownership import has_gradient
from .parameters import StepParameters, clear_weight_caches
from .path import Path
from .rng import ReplayRNG
from .turn import Portion, Turn, some
from .updates import Directions

_RATE_OF = operator.methodcaller("get", "lr")

OVER = ("taken", "undone")  # the phases of a step that was left

Phase: TypeAlias = Literal["idle", "pass", "complete", "updated", "taken", "undone"]


class Step:
    """The state of one step, and a context that takes or undoes it at its end.

    Args:
        settings: the per-step options.
        base: the base optimizer.
        coefficients: those of the recipe.
        participants: the parameters.
        scale: the loss scaling of this step.
        when_left: called with the step and its error once it is over.
        by_loop: whether a loop over ``passes()`` drives it, and not a closure.

    Attributes:
        phase: see the docstring of this module.
        kept: values for the parameter groups, once the step is taken.
        current: the pass in progress, or the last one.
        owed: tells the other processes that the step was undone; ``None`` if none waits for it.
        may_communicate: whether ``owed`` may be called when the step is left: not in the garbage collector.
        accumulates: whether a pass iterates over ``micro_batches()``.
    """

    def __init__(
        self,
        settings: Settings,
        base: Optimizer,
        coefficients: Coefficients,
        participants: StepParameters,
        scale: LossScale | GivenScale | None,
        when_left: Callable[[Step, BaseException | None], None],
        *,
        by_loop: bool,
    ) -> None:
        self.settings = settings
        self.groups = base.param_groups
        self.portion = Portion(settings.ascent_share)
        self.blocks = participants
        self.by_loop = by_loop
        self.phase: Phase = "idle"
        self.current: Turn | None = None
        self.may_communicate = True
        self.accumulates = False
        self.owed: Callable[[], None] | None = None
        self.rates_moved = False
        self._when_over = when_left
        self._losses: list[Tensor] = []
        params = participants.params
        self._device = params[0].device if params else torch.device("cpu")
        self._local: LocalSync | None = None
        if settings.recipe.second_order and self.blocks.sharded:
            raise TypeError(
                f"{settings.recipe.name} with sharded parameters: the loss cannot be differentiated twice by them. Use "
                "GAM, or DistributedDataParallel"
            )
        if settings.sync == "local" and LocalSync.is_needed():
            if self.blocks.sharded:
                raise TypeError(
                    "sync='local' with sharded parameters: no process has its own gradient for all of them; use "
                    "sync='global'"
                )
            self._local = LocalSync(settings.model, self._device, settings.recipe.name)
        is_local, on_host = self._local is not None, participants.on_host
        self.watch = FiniteWatch(settings.recipe, settings.on_nonfinite, self._device, on_host=on_host, at_end=is_local)
        if scale is not None:
            self.watch.use(scale)
        self.path = Path(settings, base, coefficients, participants, self.watch, self._local)
        self.recipe = settings.recipe  # or a rule's replacement
        self.kept = self.path.kept
        self._micro_batches: list[Any] | None = None
        self._on_exit: list[Callable[[], object]] = []
        self._grad_enabled = torch.is_grad_enabled()
        self._rng: ReplayRNG | None = None
        self.state = settings.forward_state
        if settings.model is not None:
            self.blocks.named = settings.model.named_parameters()
        self._rates: list[Any] | None = None  # recorded after the first of several passes
        self._others = OtherGradients(settings.others, params)

    def __enter__(self) -> Step:
        return self

    def leave(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> bool:
        """End the step, once: undo it unless the update is done. Return True if ``error`` asks to skip the step.

        An updated step stands, even if a hook raises an error afterwards.
        """
        if self.phase in OVER:
            return False
        undone, idle = self.phase != "updated", self.phase == "idle"
        undo = undone and not isinstance(error, NothingToDo)  # what a forward alone drew and wrote stays
        # A Ctrl-C inside no_grad() or set_grad_enabled() itself, here or before, would leave gradients disabled.
        # (Not if a loop was left early, perhaps long ago and by the garbage collector: GeneratorExit.)
        stays = error is None or isinstance(error, GeneratorExit)
        grad_enabled = torch.is_grad_enabled() if stays else self._grad_enabled
        try:
            if undone:
                with torch.no_grad():
                    self.blocks.restore()
        finally:
            try:
                self._others.close(undone=undone)
                self.state.exit(undo=undo)
                if self._rng is not None:
                    self._rng.exit(undo=undo)
            finally:
                torch._C._set_grad_enabled(grad_enabled)
                self.phase = "undone" if undone else "taken"
                self.current = None  # it refers to this object
                clear_weight_caches()
                self._losses.clear()
                self._micro_batches = None
                self.blocks.release(undone=undone)
                if self._on_exit:
                    with contextlib.ExitStack() as stack:
                        for call in self._on_exit:
                            stack.callback(call)
                if undone:
                    reshard(self.settings.model)
                    if self._local is not None and not idle:
                        self.owed = partial(self._local.give_up, len(self.blocks.params))
                self._when_over(self, error)
        return isinstance(error, SkipStep)

    __exit__ = leave

    @property
    def perturbed(self) -> bool:
        """True if a pass is in progress at perturbed weights."""
        return self.phase == "pass" and any(block.saved for block in self.blocks.all)

    @property
    def in_last_pass(self) -> bool:
        """True if the last pass is in progress."""
        return self.phase == "pass" and self.current is not None and self.current.last

    @property
    def has_gradient(self) -> bool:
        """True if backward was called in the pass in progress."""
        return bool(self._losses) or any(map(has_gradient, self.blocks.params))

    def _start(self) -> None:
        """Begin the first pass. From here on the step must be undone or taken."""
        settings, blocks, several = self.settings, self.blocks, self.recipe.passes > 1
        capturing = not blocks.on_host and is_capturing(blocks.devices)
        if capturing:
            settings.check_capture(blocks.devices)
        self.phase = "pass"
        if blocks.sharded:
            reshard(settings.model)
        if settings.replay_rng is not None:
            self._rng = settings.replay_rng
            self._rng.start(blocks.devices, several=several, capturing=capturing)
        if settings.freeze_running_statistics:
            given = settings.model, blocks.params, blocks.flags, settings.moving_buffers
            gradient = not self.recipe.second_order
            self.state.enter(*given, several=several, by_gradient=gradient, capturing=capturing)
        if self._local is not None:
            self._on_exit.append(self._local.close)
            self._local.begin()
            self.state.start_anew()  # from the buffers of rank 0

    def next_pass(self) -> Turn | None:
        """Start the next pass, or return None if the pass in progress was the last: see :meth:`advance`.

        A pass starts without gradients, with the same random numbers, and with the parameters' versions recorded.

        On a CPU, the memory of large gradients of the previous step is kept for the backup: fresh memory would have to
        be paged in, which takes as long as the whole step. The backup needs memory after the first pass anyway, so the
        peak of a step does not grow.
        """
        index = 0 if self.current is None else self.current.index + 1
        if self.phase == "pass":
            self.advance()
        else:
            self._start()
        if self.phase == "complete":
            return None
        clear_weight_caches()
        blocks, state, portion = self.blocks, self.state, self.portion
        # whether passes see parts of the batch, as known by now: then the last pass counts
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
        recipe, each = self.recipe, state.active and state.moves_parameters
        blocks.begin_pass(recycle=recipe.moves, each=each)
        if recipe.before is not None:
            with torch.no_grad():
                self.path.begin()
            blocks.begin_pass(recycle=False, each=each)  # the versions have changed
        left = recipe.passes - recipe.passes_before[self.path.newest + 1]
        self.current = Turn(index, index + left, 1.0 if left == 1 else portion.share, self.backward, portion)
        return self.current

    def unscale_by(self, scale: GivenScale) -> None:
        """Use a given scale: ``scaler.step(optimizer)`` was called in or after the last pass; its caller updates it.

        Raises:
            RuntimeError: see :meth:`GivenScale.check_serves`.
        """
        scale.check_serves(self.recipe, self.settings.schedule, is_local=self._local is not None)
        self.watch.use(scale)

    def micro_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """See :meth:`gam_fast.optimizer.SharpnessAwareOptimizer.micro_batches`."""
        self.accumulates = True
        if self._micro_batches is None:
            if self.recipe.passes == 1:  # no other pass needs them
                return self._until_end(self.portion.stream(batches))
            with self._rng.reading() if self._rng is not None else contextlib.nullcontext():
                self._micro_batches = list(some(batches))
        elif self._rng is not None:
            self._rng.skip_reading()
        share = 1.0 if self.current is None or self.current.last else self.portion.share
        return self._until_end(self.portion.batches(self._micro_batches, share))

    def _until_end(self, batches: Iterable[Any]) -> Iterator[Any]:
        found = without_last_sync(self.settings.model, batches)
        self._on_exit.append(found.close)  # its no_sync() ends with the step in any case
        return found

    def backward(self, loss: Tensor) -> None:
        """See :meth:`gam_fast.turn.Turn.backward`."""
        if self.recipe.second_order:
            if self.phase != "pass":
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
        """End a pass: take its gradient, and move to the next point of the path; complete the step after the last.

        Raises:
            RuntimeError: no parameter has a gradient, a parameter was written to during the pass, or, for a recipe of
                second order, there is no loss, or backward was called on it.
            SecondDerivativeError: a loss that cannot be differentiated twice.
            TypeError: a sparse gradient.
            NonFiniteGradientError, SkipStep: a gradient on the way is not finite.
        """
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # takes a tenth of the time of a context manager
        try:
            path = self.path
            index, recipe = path.newest + 1, path.recipe
            if self.blocks.sharded:
                reshard(self.settings.model)
            if index == 0 and self.state.active and (written := self.state.look()) and recipe.passes > 1:
                self.blocks.refuse_write(written[0], f"pass 0 of {recipe.name}")
            if self.watch.scale is not None:
                self.watch.scale.check_pass(f"pass {recipe.passes_before[index]} of {recipe.name}")
            graph = self._differentiate(index) if recipe.second_order else []
            if not self.blocks.take_all(index, keep=recipe.keeps[index]):
                self._take_in(index)
            path.newest = index
            if self.portion.weight != 1.0:
                path.coefficients.weigh(index, self.portion.weight)
                if graph:  # weigh the product too
                    path.coefficients.weigh(index + 1, self.portion.weight)
            schedule = self.settings.schedule
            if index == 0 and schedule is not None and recipe.vectors > 1 and not self._goes_on(schedule):
                graph.clear()
                self._stay()
            if graph:
                self._multiply(index, graph)
            goes_on = path.newest + 1 < path.recipe.vectors
            if self._rng is not None:
                self._rng.end(goes_on=goes_on)
            if goes_on:
                if self._rates is None:
                    self._rates = list(map(_RATE_OF, self.groups))
                path.perturb()
            else:
                self.phase = "complete"
        finally:
            torch._C._set_grad_enabled(grad_enabled)

    def _differentiate(self, index: int) -> list[Tensor | None]:
        """Compute the parameters' gradients from the loss; return them as differentiable gradients."""
        losses, self._losses = self._losses, []
        graph = hvp.differentiate(self.recipe, self.blocks, losses, index)
        return graph if index + 1 in self.recipe.products else []

    def _goes_on(self, schedule: StepSchedule) -> bool:
        """Return whether the rule takes the whole recipe, given the gradient at θ; wait for an accelerator."""
        self.path.first_square = self.blocks.square_norm(0)
        square = float(self.path.first_square) * self.portion.weight**2
        if self.watch.scale is not None:
            square *= float(self.watch.scale.inverse(self._device)) ** 2
        if self._local is not None:
            square = self._local.mean(self.blocks, square)
        else:
            square = mean_over_processes(square, self.settings.model, self._device)
        found, kept = schedule.look(square, self.groups[0])
        self.path.kept.update(kept)
        return found

    def _stay(self) -> None:
        """Make the step one of the base optimizer, with this gradient, or with one more pass over the whole batch."""
        self.path.stay()
        self.recipe = self.path.recipe
        if self.portion.share < 1.0 and self.portion.asked:
            self.blocks.drop(0)
            self.path.newest = -1
        else:
            self.blocks.give_back(0)

    def _multiply(self, index: int, graph: list[Tensor | None]) -> None:
        """Compute the Hessian times the normalised gradient of vector ``index`` as the next vector."""
        total = self.blocks.square_norm(index)
        self.watch.check(total, {index})
        hvp.multiply(self.blocks, index, graph, total, keep=index in self.recipe.plan[index][1])
        if not self.blocks.take_all(index + 1, keep=self.recipe.keeps[index + 1]):
            self._take_in(index + 1)
        self.path.newest = index + 1

    def _take_in(self, index: int) -> None:
        """Take ``param.grad`` as vector ``index`` if the fast path does not apply."""
        if index == 0 and self.settings.skips_empty and not self.has_gradient:
            raise NothingToDo
        mend: str | None = (
            "call backward() on the loss in every pass, in the closure or in the body of the loop over passes(). (To "
            "skip a batch, leave the loop by break. The optimizer must hold the parameters of the model that runs; "
            "construct it after fully_shard. A backward() before step() does not count, nor one that zero_grad() "
            "follows; an iterator that pass 0 has read to its end needs optimizer.micro_batches())"
        )
        if self.recipe.second_order:
            mend = "the loss does not depend on the parameters of this optimizer"
        elif self.recipe.passes == 1 and self._local is None:
            mend = None  # like torch's optimizers, do nothing then
        recipe, put_back = self.recipe, self.recipe.before is not None
        keep, where = recipe.keeps[index], f"pass {recipe.passes_before[index]} of {recipe.name}"
        self.blocks.take_in(index, keep=keep, where=where, mend=mend, may_write=not recipe.moves, put_back=put_back)

    def finish(self, update: Callable[[Directions], Sequence[Tensor]]) -> None:
        """Finish the last pass: pass the direction of every block to ``update``, which restores θ and steps."""
        grad_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            self.rates_moved = self._have_rates_moved()
            directions = self.path.directions()
            if self.state.active:
                self.state.settle()
            left_alone = update(directions)
            if self.recipe.keeps_first or self.settings.difference is not None:
                self.path.end(left_alone)
            self.phase = "updated"
            if self._others.params:
                self._others.finish()
            if self.watch.scale is not None:
                self.watch.scale.report(True, self._device)
            if self.recipe.second_order:  # param.grad is not a gradient of the loss
                self.blocks.clear_gradients()
        finally:
            torch._C._set_grad_enabled(grad_enabled)

    def _have_rates_moved(self) -> bool:
        """Return whether a learning rate was changed since the first pass."""
        now = list(map(_RATE_OF, self.groups))
        if self._rates is None or (len(now) == len(self._rates) and all(map(operator.is_, self._rates, now))):
            return False
        pairs = zip(self._rates, now, strict=False)
        return any(isinstance(a, float) and isinstance(b, float) and a != b for a, b in pairs)
