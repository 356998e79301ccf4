"""From one step to the next: the results that go over, and warnings of what a user did between and in them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .active import STEPS
from .buffers import ForwardState
from .coefficients import Coefficients
from .distributed import local
from .finite import SkipStep
from .hooks import Call
from .models import CLOSED, message_of_forgotten
from .ownership import version
from .parameters import StepParameters
from .step import OVER, Step
from .turn import frames_of_libraries


@dataclass(eq=False)
class Progress:
    """The state that moves in every step: one object, which copies of the attributes by wrappers share."""

    skipped_steps: int = 0
    step: Step | None = None
    """The step that was made last, until it is left."""
    left_by: str = ""
    """``"loop"`` if a loop took the step before, ``"other"`` if it ended otherwise; ``""`` once the next has begun."""
    begin_with: Callable[[], object] | None = None
    """Called before anything else in the next step: it raises an error, or tells other processes of one."""
    zeroes_in_place: bool = False
    """True once somebody has zeroed gradients in place between steps."""
    warned_of_share: bool = False
    forward_state: ForwardState = field(default_factory=ForwardState)
    mode: str = ""
    """``"train"`` or ``"eval"``, whichever the optimizer was last told, if it was."""
    coefficients: Coefficients | None = None
    """Those of the step before, which are mostly those of the next."""
    participants: StepParameters | None = None
    call: Call | None = None
    """The arguments of the ``step()`` that is under way."""
    updated: Call | None = None
    """Those of one that has updated the parameters: the hooks after it are due."""
    unscaled_since: int | None = None
    """When the step began, or one before that was undone: no loss may be scaled since unless the scaler is given."""

    @property
    def current(self) -> Step | None:
        """The step that is under way."""
        step = self.step  # which a Ctrl-C at an unlucky moment may leave behind
        return None if step is None or step.phase == "idle" or step.phase in OVER else step

    def leave(self, optimizer: torch.optim.Optimizer, step: Step, error: BaseException | None) -> None:
        """The step was taken, or undone because of ``error``: count it, and mark the gradients it leaves."""
        if self.step is not step:
            return
        groups = optimizer.param_groups
        self.step = None
        self.begin_with = step.owed
        if step.owed is not None and step.may_communicate:
            self.begin_with = None
            with contextlib.suppress(RuntimeError):  # of the network: it would hide the error that the step is left by
                step.owed()
        if isinstance(error, SkipStep):
            self.skipped_steps += 1
            for called in (optimizer, getattr(optimizer, "base", optimizer)):  # a skipped step was a call of either,
                called._opt_called = True  # type: ignore[union-attr]  # for schedulers
        left = first_gradient(groups)
        if left is not None:
            left._gam_fast_left = version(left), CLOSED.steps  # type: ignore[attr-defined]
        taken = step.phase == "taken"
        self.left_by = "loop" if step.by_loop and taken else "other"
        if taken:
            for group in groups:
                if STEPS in group:
                    group[STEPS] += 1
                group.update(step.kept)
            self._warn_after(step, type(optimizer).__name__)

    def fail_later(self, error: Exception, name: str) -> None:
        """Keep an error that cannot be raised now for the next step."""

        def fail() -> None:
            raise error

        self.begin_with = fail
        warnings.warn(
            f"a loop over passes() of {name} did not ask for a pass after its last (zip and islice do "
            f"not), and the update that it left undone failed: {error}. The error is raised "
            "by the next step; `with optimizer.passes() as turns:` around the loop raises it at once",
            stacklevel=frames_of_libraries(),
        )

    def check_not_taken(self, groups: Sequence[dict[str, Any]], name: str) -> None:
        """Refuse ``step()`` behind a loop that took the step; a backward since would have changed the version."""
        found = first_gradient(groups)
        if (
            self.left_by == "loop"
            and found is not None
            and getattr(found, "_gam_fast_left", (-1,))[0] == version(found)
        ):
            raise RuntimeError(
                f"step() of {name} behind a loop over passes(), which has taken this step already: "
                "leave step() out (or call it in the last pass)"
            )

    def warn_of_unused_gradients(self, groups: Sequence[dict[str, Any]], name: str) -> None:
        """Where somebody called backward() since the last step: each pass computes gradients of its own.

        What a step has left behind is marked with its version, which moves when another backward adds to it; a step of
        another optimizer of ours may do that. Before the first step what is there may well be of another optimizer.
        """
        found, left_by = first_gradient(groups), self.left_by
        self.left_by = ""  # until the end of this step, if it comes to one
        if found is None or not left_by:
            return
        then, steps = getattr(found, "_gam_fast_left", (-1, CLOSED.steps))
        if then != version(found) and steps == CLOSED.steps and not self._is_zeroed(found):
            warnings.warn(
                f"the gradients that were there before this step of {name} are not used: each of its "
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
        if found.device.type == "cpu" or not self.zeroes_in_place:
            self.zeroes_in_place = not bool(local(found).any())
        return self.zeroes_in_place

    def _warn_after(self, step: Step, name: str) -> None:
        """Warn, once, of what a step shows that was taken."""
        portion, forgotten = step.portion, step.state.forgotten
        if portion.share < 1.0 and step.recipe.passes > 1 and not (portion.asked or self.warned_of_share):
            self.warned_of_share = True
            warnings.warn(
                f"ascent_share={portion.share} of this {name} had no effect: nobody asked which rows a "
                "pass is to see. In the loop over passes(), take xb, yb = turn.rows(x, y); a closure gets the turn as "
                "its argument if that is called turn (or asks optimizer.turn)",
                stacklevel=frames_of_libraries(),
            )
        if forgotten:  # buffers of a module that has our parameters have moved, and perhaps did so in every pass
            step.state.forgotten = []
            warnings.warn(message_of_forgotten(name, forgotten), stacklevel=frames_of_libraries())
        if step.rates_moved:
            warnings.warn(
                f"a learning rate was changed between the passes of a step of {name}: a body runs "
                "once a pass. scheduler.step(), and whatever else happens once a step, belongs behind the loop "
                "over passes() or the closure",
                stacklevel=frames_of_libraries(),
            )


def first_gradient(groups: Iterable[dict[str, Any]]) -> Tensor | None:
    """Return the first gradient there is."""
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                grad: Tensor = param.grad
                return grad
    return None
