"""State that carries over from one step to the next, and warnings about misuse between and in steps."""

from __future__ import annotations

import contextlib
import sys
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
from .finite import NothingToDo, SkipStep
from .hooks import Call
from .models import CLOSED
from .ownership import version
from .parameters import StepParameters
from .step import OVER, Step
from .turn import frames_of_libraries


@dataclass(eq=False)
class Progress:
    """The state that changes in every step. One object, so that wrappers that copy attributes share it."""

    skipped_steps: int = 0
    step: Step | None = None
    """The latest step, until it is left."""
    left_by: str = ""
    """``"loop"`` if a loop took the last step, ``"other"`` if it ended otherwise; ``""`` during a step."""
    begin_with: Callable[[], object] | None = None
    """Called first in the next step: raises an earlier error, or tells other processes of one."""
    zeroes_in_place: bool = False
    """True once gradients were zeroed in place between steps."""
    warned_of_share: bool = False
    warned_of_accumulation: bool = False
    forward_state: ForwardState = field(default_factory=ForwardState)
    mode: str = ""
    """The last mode that was set, ``"train"`` or ``"eval"``; ``""`` for none."""
    coefficients: Coefficients | None = None
    """The coefficients of the last step, which mostly serve the next."""
    participants: StepParameters | None = None
    call: Call | None = None
    """The arguments of the ``step()`` in progress."""
    updated: Call | None = None
    """The arguments of a ``step()`` that has updated the parameters, so that its post-hooks are due."""
    unscaled_since: int | None = None
    """Start time of the step, or of an undone one before it. Losses scaled since need ``scaler=``."""

    @property
    def current(self) -> Step | None:
        """The step in progress."""
        step = self.step  # a Ctrl-C may have left a finished step here
        return None if step is None or step.phase == "idle" or step.phase in OVER else step

    def leave(self, optimizer: torch.optim.Optimizer, step: Step, error: BaseException | None) -> None:
        """Record that the step was taken, or undone because of ``error``; mark the gradients it leaves."""
        if self.step is not step:
            return
        groups = optimizer.param_groups
        self.step = None
        self.begin_with = step.owed
        if step.owed is not None and step.may_communicate:
            self.begin_with = None
            with contextlib.suppress(RuntimeError):  # a network error would hide the error that ended the step
                step.owed()
        if isinstance(error, SkipStep):
            self.skipped_steps += not isinstance(error, NothingToDo)
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
        """Keep an error that cannot be raised now, and raise it in the next step."""

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
        """Refuse ``step()`` after a loop that took the step, if no backward has changed a gradient's version since."""
        found = first_gradient(groups)
        if (
            self.left_by == "loop"
            and found is not None
            and getattr(found, "_gam_fast_left", (-1,))[0] == version(found)
        ):
            raise RuntimeError(
                f"step() of {name} after a loop over passes(), which has taken this step already: "
                "leave step() out (or call it in the last pass)"
            )

    def warn_of_unused_gradients(self, groups: Sequence[dict[str, Any]], name: str) -> None:
        """Warn if backward() was called since the last step: its gradients are not used.

        The gradients that a step leaves are marked with their version, which changes when another backward adds to
        them. A step of another gam_fast optimizer may do that, and is no reason to warn. Before the first step,
        gradients may well belong to another optimizer.
        """
        found, left_by = first_gradient(groups), self.left_by
        self.left_by = ""  # until this step ends
        if found is None or not left_by:
            return
        then, steps = getattr(found, "_gam_fast_left", (-1, CLOSED.steps))
        if then != version(found) and steps == CLOSED.steps and not self._is_zeroed(found):
            warnings.warn(
                f"the gradients that were there before this step of {name} are not used: each of its "
                "passes computes its own. Call no backward() before step(closure) or passes(); to accumulate over "
                "micro-batches, have all of them in every pass, by optimizer.micro_batches() (Lightning's "
                "accumulate_grad_batches and accelerator.accumulate() show the step the last of them only). If they "
                "belong to another loss, call zero_grad() before the step. (clip_grad_norm_() after a step has no "
                "effect: clip by clip_grad_norm= of the constructor)",
                stacklevel=frames_of_libraries(),
            )

    def _is_zeroed(self, found: Tensor) -> bool:
        """Return whether a gradient was zeroed in place, as by ``zero_grad(set_to_none=False)``.

        The check waits for an accelerator, so there it is made only once.
        """
        if found.device.type == "cpu" or not self.zeroes_in_place:
            self.zeroes_in_place = not bool(local(found).any())
        return self.zeroes_in_place

    def _warn_after(self, step: Step, name: str) -> None:
        """Warn, once, about misuse that a finished step shows."""
        portion, forgotten = step.portion, step.state.forgotten
        if portion.share < 1.0 and step.recipe.passes > 1 and not (portion.asked or self.warned_of_share):
            self.warned_of_share = True
            warnings.warn(
                f"ascent_share={portion.share} of this {name} had no effect: no code asked which rows a "
                "pass should see. In the loop over passes(), take xb, yb = turn.rows(x, y); a closure gets the turn as "
                "its argument if that is called turn (or asks optimizer.turn)",
                stacklevel=frames_of_libraries(),
            )
        accelerate = sys.modules.get("accelerate.state")
        if accelerate is not None and not (step.accumulates or step.by_loop or self.warned_of_accumulation):
            count = accelerate.GradientState._shared_state.get("plugin_kwargs", {}).get("num_steps", 1)
            if count > 1 and step.recipe.passes > 1 and _is_called_by("accelerate.optimizer"):
                self.warned_of_accumulation = True
                warnings.warn(
                    f"gradient_accumulation_steps={count} of Accelerate shows a step of {name} the last micro-batch "
                    "only, with its loss divided: leave accelerator.accumulate() out, and iterate over "
                    "optimizer.micro_batches() of the unwrapped optimizer in every pass",
                    stacklevel=frames_of_libraries(),
                )
        if forgotten:  # buffers of a module with our parameters have moved, perhaps in every pass
            step.state.forgotten = []
            warnings.warn(
                f"the forward moves buffers of the module that this {name} trains ({', '.join(forgotten[:4])}"
                f"{', …' if len(forgotten) > 4 else ''}), in each pass of a step: construct it with model=model, a "
                "module that holds all of its parameters (torch.nn.ModuleList([...]) of several), or set "
                "optimizer.model, so that they move once per step, as running statistics should "
                "(freeze_running_statistics=False if they should not)",
                stacklevel=frames_of_libraries(),
            )
        if step.rates_moved:
            warnings.warn(
                f"a learning rate was changed between the passes of a step of {name}: the body runs "
                "once per pass. scheduler.step(), and all code for once per step, belongs after the loop "
                "over passes() or the closure",
                stacklevel=frames_of_libraries(),
            )


def _is_called_by(module: str) -> bool:
    """Return whether a function of the module is running."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None


def first_gradient(groups: Iterable[dict[str, Any]]) -> Tensor | None:
    """Return the first gradient of a parameter, or None."""
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                grad: Tensor = param.grad
                return grad
    return None
