"""One step, driven by a loop over its passes or by a closure.

The transient part of a step is in :mod:`gam_fast.step`; what lasts is in :mod:`gam_fast.optimizer`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, overload

import torch
from torch import Tensor, nn

from . import radius
from .active import STEPS, StepSchedule
from .amp import GivenScale, LossScale, check_not_forgotten, now
from .backends import Backend
from .buffers import ForwardState
from .distributed import local
from .finite import SkipStep
from .hooks import Calls, Hooked, any_before, call_before
from .models import CLOSED, Surroundings, message_of_forgotten
from .ownership import version
from .parameters import StepParameters
from .passes import PassDriver, Passes
from .recipes import BASE, Coefficients, Recipe
from .settings import Settings
from .step import Step
from .turn import Loss, Turn, TurnClosure, evaluation, frames_of_libraries
from .updates import Directions, apply, only_makes_state


@dataclass(eq=False)
class Progress:
    """What moves in every step; one object, so that wrappers with a copy of the optimizer's attributes see it move."""

    skipped_steps: int = 0
    step: Step | None = None
    stepped: bool = False
    """Whether there was a step before, and it came to an end."""
    loop_took_step: bool = False
    """Whether a loop over the passes has driven that step, and it was taken."""
    error: Exception | None = None
    """An error that the next step raises, because nobody would have seen it when it occurred."""
    owed: Callable[[], None] | None = None
    """A message to the other processes that the next step begins with."""
    zeroes_in_place: bool = False
    """Whether somebody zeroes gradients in place between steps."""
    warned_of_share: bool = False
    forward_state: ForwardState = field(default_factory=ForwardState)
    mode: str = ""
    """``"train"`` or ``"eval"``, whichever the optimizer was last told, if it was."""
    seen: dict[str, float] = field(default_factory=dict)
    """What the step under way has to put into the groups once it is taken."""
    coefficients: Coefficients | None = None
    """Those of the step before, which are mostly those of the next."""
    participants: StepParameters | None = None
    difference: radius.Difference | None = None
    """The automatic radius of the step under way."""
    calls: Calls = field(default_factory=Calls)
    unscaled_since: int | None = None
    """When the step began, or one before that was undone: no loss may be scaled since unless the scaler is given."""


class Stepper(Hooked):
    """The steps of :class:`gam_fast.optimizer.SharpnessAwareOptimizer`, which has what lasts between them."""

    recipe: ClassVar[Recipe] = BASE
    _step_supports_amp_scaling: ClassVar[bool] = True  # asked for by GradScaler.step
    base: torch.optim.Optimizer
    _keys: dict[str, str]
    _own_defaults: dict[str, Any]
    _options: dict[str, Any]
    _model: nn.Module | None
    _progress: Progress
    _schedule: StepSchedule
    _surroundings: Surroundings

    def _select(self, device: torch.device) -> Backend:
        raise NotImplementedError

    def _complete_groups(self) -> None:
        raise NotImplementedError

    @property
    def skipped_steps(self) -> int:
        """How many steps were undone because a gradient was not finite (``on_nonfinite="skip"``, or a scaler)."""
        return self._progress.skipped_steps

    @property
    def turn(self) -> Turn | None:
        """The pass that is under way, for code that is called in it, such as a closure; ``None`` between steps."""
        return None if self._current is None else self._current.current

    @property
    def _current(self) -> Step | None:
        step = self._progress.step  # which a Ctrl-C at an unlucky moment may leave behind
        return step if step is not None and step.under_way else None

    def passes(self, scaler: Any = None) -> Passes:
        """The passes of one step: run forward and backward once in the body for each.

        The update happens when the loop asks for a pass after the last, or, where a framework wants to see it, when
        :meth:`step` or ``scaler.step(optimizer)`` is called in the last. Leaving the loop early undoes the step;
        :class:`~gam_fast.passes.Passes` says more of how loops end. The hooks of ``register_step_pre_hook`` and
        ``register_step_post_hook`` run around the update; the first find the final direction in ``param.grad``, and
        what they leave there is taken.

        Args:
            scaler: a :class:`torch.amp.GradScaler`. Call ``turn.backward(loss)``, or ``scaler.scale(loss).backward()``,
                in each pass, and neither ``scaler.unscale_``, ``scaler.step`` nor ``scaler.update``: the step does all
                that. (A framework that calls ``scaler.step`` and ``scaler.update`` by itself does so in the last pass.)
                A gradient that is not finite, in any pass, undoes the step, whatever ``on_nonfinite`` is; the scale
                goes down, and :attr:`skipped_steps` up.

        Raises:
            RuntimeError: one of several passes ended without a gradient, or modified a parameter (the first leaves it
                so); a step of this optimizer is under way; with a scaler, the loss was not scaled or its gradient was
                unscaled; with ``sync="local"``, another process left the step by an exception.
            TypeError: a sparse gradient.
            NonFiniteGradientError: a gradient with NaN or infinity, unless ``on_nonfinite`` says otherwise.

        Warns:
            UserWarning: somebody called backward() since the last step; those gradients are not used.
        """
        self._refuse_nesting("passes()")
        return Passes(PassDriver(self, None if scaler is None else self._loss_scale(scaler)))

    @overload
    def step(self, closure: None = None, *, scaler: Any = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss], *, scaler: Any = None) -> Loss: ...
    @overload
    def step(self, closure: TurnClosure[Loss], *, scaler: Any = None) -> Loss: ...
    def step(self, closure: Callable[..., Any] | None = None, *, scaler: Any = None) -> Any:
        """One step; ``closure`` computes the loss and calls backward on it, and is called once a pass.

        A closure whose one required argument is called ``turn`` gets the :class:`~gam_fast.Turn`, for
        ``turn.rows(x, y)``. For ``ExactGAM`` it returns the loss and does not call backward.

        Returns what the closure returned in the first pass: the loss at θ, before any perturbation (``None`` when it
        returns nothing). Without a closure, a recipe of one pass uses the gradients there are, as any torch optimizer,
        and does nothing where there are none; the others refuse. Without one in the last pass of a loop over
        :meth:`passes`, it takes that step there and then, and the loop ends.

        Args:
            closure: evaluates the loss, by ``scaler.scale(loss).backward()`` where there is a ``scaler``.

        Raises:
            RuntimeError, TypeError, NonFiniteGradientError: as :meth:`passes`.
            TypeError: a closure that is not a function, or needs other arguments.

        >>> from gam_fast import Base
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = Base([weight], torch.optim.SGD, lr=0.5)
        >>> def closure():
        ...     loss = (weight**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> optimizer.step(closure).item()
        25.0
        """
        try:
            given = GivenScale.handed_to(self)
            step = self._current
            if step is not None and step.by_loop and (step.complete or (step.in_last_pass and closure is None)):
                return self._end(step, closure, given, scaler)
            self._refuse_nesting("step()")
            scale = None if scaler is None else self._loss_scale(scaler)
            if closure is None:
                self._step_without_closure(scale or given)
                return None
            evaluate = evaluation(closure)
            if given is not None:
                raise RuntimeError(
                    "scaler.step(optimizer, closure): a gradient scaler takes no closure. Call step(closure, "
                    "scaler=scaler), or run the loop over passes(scaler=scaler)"
                )
        except BaseException:
            GivenScale.drop(self)
            raise
        # from here on nothing was handed over: that was refused
        first = None
        passes = PassDriver(self, scale, by_loop=False)
        try:
            while (turn := passes.next_pass()) is not None:
                with torch.enable_grad():
                    loss = evaluate(turn)
                if self.recipe.second_order:
                    turn.backward(loss)
                    loss = loss.detach()  # its graph would live as long as the loss does
                if turn.index == 0:
                    first = loss
        except BaseException as error:
            passes.undo(error)
            raise
        return first

    def micro_batches(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Accumulation: the same micro-batches in each pass of a step, whose gradients add up.

        To be iterated over in the body of a loop over :meth:`passes`, or in a closure. The gradient is that of the sum
        of the losses: divide each by their number for the mean. With ``ascent_share`` all passes but the last get that
        share of them, whose gradients count as those of all; all processes then need the same number of them.
        A DistributedDataParallel (``model``) averages gradients with the last micro-batch only.

        An iterator is read once, with the random numbers that reading draws: in the first of several passes, before
        the first micro-batch is used. It is held until the step is over. Where one pass is all (``Base``, an inactive
        step), each micro-batch is read when it is used (by DistributedDataParallel one ahead), and not held.

        Args:
            batches: the micro-batches of the step, such as ``itertools.islice(loader_iterator, 4)``.

        Raises:
            RuntimeError: outside a step.
            ValueError: there is none.
        """
        if self._current is None:
            raise RuntimeError(
                "micro_batches() outside a step: iterate over it in the body of `for turn in optimizer.passes():`, or "
                "in the closure"
            )
        return self._current.micro_batches(batches)

    def _update(self, directions: Directions) -> None:
        """End a step: call the hooks before it, and update the parameters."""
        progress = self._progress
        passes = progress.step.recipe.passes if progress.step is not None else self.recipe.passes
        since, progress.unscaled_since = progress.unscaled_since, None
        if since is not None and (progress.step is None or progress.step.watch.scale is None):
            check_not_forgotten(since, self, passes)
        call = progress.calls.current or ((self,), {})
        before = partial(call_before, self, call) if any_before(self) else None
        # of one pass, param.grad is what the hooks leave there, as with any torch optimizer
        apply(self.base, directions, before, copy=passes > 1)
        progress.calls.updated = call

    def _loss_scale(self, scaler: Any) -> LossScale | None:
        scale = LossScale(scaler, self)
        return scale if scale.enabled else None

    def _begin(self, scale: LossScale | None, *, by_loop: bool) -> Step:
        """Begin a step of several passes; nothing is done to the parameters yet."""
        self._refuse_nesting("passes()")
        since = self._progress.unscaled_since
        if since is not None and scale is None:  # the step before was undone, perhaps because of an overflow
            check_not_forgotten(since, self, self.recipe.passes)
        self._progress.unscaled_since = now()
        step = self._open(scale, by_loop=by_loop)
        GivenScale.drop(self)  # of a call that came to nothing
        try:
            self._warn_of_unused_gradients()
        except BaseException as error:
            self._leave(step, error)
            raise
        return step

    def _open(self, scale: LossScale | GivenScale | None, *, by_loop: bool = False) -> Step:
        self._check_can_step()
        progress = self._progress
        owed, progress.owed = progress.owed, None
        if owed is not None:
            owed()
        missed, progress.error = progress.error, None
        if missed is not None:
            raise missed
        groups, schedule = self.base.param_groups, self._schedule
        whole = schedule.is_always or not groups
        if not whole:
            if not schedule.fields.keys() <= groups[0].keys():  # somebody has loaded a state into the base optimizer
                self._complete_groups()
            whole = schedule.wants(int(groups[0][STEPS]))
        hyper = [
            {name: group.get(key, self._own_defaults[key]) for name, key in self._keys.items()} if whole else {}
            for group in groups
        ]
        name, difference = self.recipe.difference if whole else None, None
        for h in hyper:
            if name is not None and isinstance(h[name], str):
                difference = radius.Difference.of(groups, hyper, name)
                break
        progress.seen, progress.difference = {}, difference
        recipe, coefficients = self.recipe if whole else self.recipe.plain, progress.coefficients
        if coefficients is not None:
            coefficients = coefficients.again(recipe, groups, hyper)
        if coefficients is None:
            coefficients = Coefficients(recipe, groups, hyper)
        progress.coefficients = coefficients
        around = self._surroundings.look(self._model, groups)
        keep, participants = not around.has_bucket_views, progress.participants
        if participants is not None:
            participants = participants.again(groups, self._select, recipe.name, keep_parts=keep)
        if participants is None:
            participants = StepParameters(groups, self._select, recipe.name, keep_parts=keep)
        progress.participants = participants
        settings = Settings(
            recipe,
            self._model,
            forward_state=self._progress.forward_state,
            goes_on=None if schedule.trigger is None else self._goes_on,
            others=around.others,
            measure_change=difference is not None,
            **self._options,
        )
        step = progress.step = Step(settings, groups, coefficients, participants, scale, by_loop=by_loop)
        return step

    def _end(self, step: Step, closure: Callable[[], Any] | None, given: GivenScale | None, scaler: Any = None) -> Any:
        """Update by a loop, all passes of which are made or in the last of which it is.

        A wrapper that steps with a closure of its own, such as Lightning's, has it called.
        """
        result = None
        try:
            if scaler is not None:
                raise RuntimeError("step(scaler=) in the last pass of a loop: the loop is passes(scaler=scaler)")
            if given is not None:
                step.unscale_by(given)
            if not step.complete:
                step.advance()
                step.complete = True
            elif closure is not None:
                result = closure()
            step.finish(self._update)
        except BaseException as error:
            if not self._leave(step, error):
                raise
        else:
            self._leave(step, None)
        return result

    def _step_without_closure(self, scale: LossScale | GivenScale | None) -> None:
        if self.recipe.passes > 1:
            if only_makes_state(self.base):
                self.base.step()
                return
            raise RuntimeError(
                f"{type(self).__name__} takes {self.recipe.passes} passes a step: call step(closure), which is "
                "called once a pass, or run forward and backward in `for turn in optimizer.passes():`. Where a "
                "GradScaler or a framework calls step() without a closure (scaler.step(optimizer), Lightning's "
                "automatic optimization with precision='16-mixed'), use passes(scaler=scaler), or bf16, which needs "
                "no scaler. Behind a loop over passes(), which has taken its step, leave step() out"
            )
        found = self._first_gradient()
        if (  # a backward since would have changed the version
            self._progress.loop_took_step
            and found is not None
            and getattr(found, "_gam_fast_left", (-1,))[0] == version(found)
        ):
            raise RuntimeError(
                f"step() of {type(self).__name__} behind a loop over passes(), which has taken this step already: "
                "leave step() out (or call it in the last pass)"
            )
        step = self._open(scale)
        try:
            step.advance()
            step.finish(self._update)
        except BaseException as error:
            if not self._leave(step, error):
                raise
        else:
            self._leave(step, None)

    def _leave(self, step: Step, error: BaseException | None) -> bool:
        """End a step, or undo it because of ``error``. Return True if the error asks to skip the step."""
        progress = self._progress
        first = progress.step is step  # the end of a loop is within the step that it calls
        try:
            if isinstance(error, SkipStep) and first:
                progress.skipped_steps += 1
                self._opt_called = True  # for learning-rate schedulers: a skipped step was a call
                self.base._opt_called = True  # type: ignore[attr-defined]  # and for those constructed on the base
            is_skipped = step.leave(error)
        finally:
            if first:
                if step.finished:
                    self._count(step)
                progress.step = None
                progress.owed = step.owed
                left = self._first_gradient()
                if left is not None:
                    left._gam_fast_left = version(left), CLOSED.steps  # type: ignore[attr-defined]
                progress.stepped = True
                progress.loop_took_step = step.by_loop and step.finished
        if first and step.finished:
            if step.portion.share < 1.0:
                self._warn_of_unused_share(step)
            if step.state.forgotten:
                self._warn_of_forgotten_model(step)
            if step.rates_moved:
                warnings.warn(
                    f"a learning rate was changed between the passes of a step of {type(self).__name__}: a body runs "
                    "once a pass. scheduler.step(), and whatever else happens once a step, belongs behind the loop "
                    "over passes() or the closure",
                    stacklevel=frames_of_libraries(),
                )
        return is_skipped

    def _fail_later(self, error: Exception) -> None:
        """Keep an error that cannot be raised now for the next step."""
        self._progress.error = error
        warnings.warn(
            f"a loop over passes() of {type(self).__name__} did not ask for a pass after its last (zip and islice do "
            f"not), and the update that it left undone failed: {error}. The error is raised "
            "by the next step; `with optimizer.passes() as turns:` around the loop raises it at once",
            stacklevel=frames_of_libraries(),
        )

    def _goes_on(self, square: float) -> bool:
        """Return whether a step takes the whole recipe, its first gradient being so large."""
        found, self._progress.seen = self._schedule.look(square, self.param_groups[0])
        return found

    def _count(self, step: Step) -> None:
        """A step was taken."""
        seen, difference = self._progress.seen, self._progress.difference
        if difference is not None and step.relative_change is not None:
            seen.update(difference.after(step.relative_change))
        for group in self.base.param_groups:
            if STEPS in group:
                group[STEPS] += 1
            group.update(seen)

    def _warn_of_unused_share(self, step: Step) -> None:
        """Once, where a step of several passes has asked for less than the batch and got the whole of it."""
        if step.recipe.passes == 1 or step.portion.asked or self._progress.warned_of_share:
            return
        self._progress.warned_of_share = True
        warnings.warn(
            f"ascent_share={step.portion.share} of this {type(self).__name__} had no effect: nobody asked which rows a "
            "pass is to see. In the loop over passes(), take xb, yb = turn.rows(x, y); a closure gets the turn as its "
            "argument if that is called turn (or asks optimizer.turn)",
            stacklevel=frames_of_libraries(),
        )

    def _warn_of_forgotten_model(self, step: Step) -> None:
        """Once, where buffers of a module that has our parameters have moved, and perhaps did so in every pass."""
        forgotten, step.state.forgotten = step.state.forgotten, []
        warnings.warn(message_of_forgotten(type(self).__name__, forgotten), stacklevel=frames_of_libraries())

    def _first_gradient(self) -> Tensor | None:
        for group in self.base.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    grad: Tensor = param.grad
                    return grad
        return None

    def _warn_of_unused_gradients(self) -> None:
        """Where somebody called backward() since the last step: each pass computes gradients of its own.

        What a step has left behind is marked with its version, which moves when another backward adds to it; a step of
        another optimizer of ours may do that. Before the first step what is there may well be of another optimizer.
        """
        found, stepped = self._first_gradient(), self._progress.stepped
        self._progress.stepped = False  # until the end of this step, if it comes to one
        if found is None or not stepped:
            return
        then, steps = getattr(found, "_gam_fast_left", (-1, CLOSED.steps))
        if then != version(found) and steps == CLOSED.steps and not self._is_zeroed(found):
            warnings.warn(
                f"the gradients that were there before this step of {type(self).__name__} are not used: each of its "
                "passes computes its own. Call no backward() before step(closure) or passes(); to accumulate over "
                "micro-batches, have all of them in every pass, by optimizer.micro_batches() (Lightning's "
                "accumulate_grad_batches and accelerator.accumulate() show the step the last of them only). Where they "
                "are of something else, zero_grad() says so",
                stacklevel=frames_of_libraries(),
            )

    def _is_zeroed(self, found: Tensor) -> bool:
        """Return whether a gradient was zeroed in place, as ``zero_grad(set_to_none=False)`` does.

        Looking waits for an accelerator, so there only the first look counts.
        """
        progress = self._progress
        if found.device.type == "cpu" or not progress.zeroes_in_place:
            progress.zeroes_in_place = not bool(local(found).any())
        return progress.zeroes_in_place

    def _check_can_step(self) -> None:
        """For a method that cannot work in every process."""

    def _refuse_nesting(self, what: str) -> None:
        if self._progress.step is not None and self._current is not None:
            raise RuntimeError(
                f"{what} while a step of this {type(self).__name__} is under way: run the loop over passes() to its "
                "end, or close() the iterator to undo the step"
            )
