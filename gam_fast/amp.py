"""Loss scaling: what a step has to do with a :class:`torch.amp.GradScaler`."""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .recipe import Recipe

_NEEDED = ("scale", "unscale_", "update", "is_enabled")


class _Outcome:
    """Stands for an optimizer whose one gradient says whether a step was finite, for ``GradScaler.unscale_``."""

    def __init__(self, finite: bool, device: torch.device) -> None:
        param = torch.zeros(1, device=device)
        param.grad = torch.full((1,), 0.0 if finite else float("inf"), device=device)
        self.param_groups = [{"params": [param]}]


class GivenScale:
    """A step that ``scaler.step(optimizer)`` calls, as frameworks do.

    torch then hands the scale over in the attributes ``grad_scale`` and ``found_inf``, as it does to its own fused
    optimizers, and leaves it to the optimizer to unscale and to skip. The caller updates the scaler.

    Args:
        grad_scale: the scale of the gradients; ``None`` if they were unscaled already.
        found_inf: a number other than 0 if the step is to be skipped; ``None`` if the gradients alone say so.

    Attributes:
        total: a number to be looked at with the sums that must be finite: infinite if the step is to be skipped.
    """

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None = None) -> None:
        self.unscaled = grad_scale is None
        self.total = None if found_inf is None else (torch.as_tensor(found_inf) == 0).all().float().reciprocal()
        self._inverse = torch.ones(()) if grad_scale is None else grad_scale.float().reciprocal()

    @classmethod
    def handed_to(cls, optimizer: object) -> GivenScale | None:
        """Return what was handed to the optimizer, or None. After an error torch leaves it there: :meth:`drop`."""
        given = vars(optimizer)
        scale, found_inf = given.get("grad_scale"), given.get("found_inf")
        return None if scale is None and found_inf is None else cls(scale, found_inf)

    @staticmethod
    def drop(optimizer: object) -> None:
        """Forget what a call that came to nothing has handed over."""
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss: whoever calls ``scaler.step`` scales it."""
        return loss

    def check_serves(self, recipe: Recipe, schedule: object, *, is_local: bool) -> None:
        """Refuse a step that cannot wait with unscaling until ``scaler.step``.

        Raises:
            RuntimeError: a local step, one of second order, one that needs the length of its first gradient, or one
                that decides by that; the scaler has unscaled the gradients of one of several passes.
        """
        if is_local or recipe.second_order or recipe.needs_lengths:
            kind = "with sync='local'" if is_local else f"of {recipe.name}"
            why = "torch looks at the gradients of one pass on one process"
            if recipe.needs_lengths and not is_local:
                why = "the method needs the length of the first gradient, which is not known before the scale is"
            raise RuntimeError(
                f"scaler.step(optimizer) in a step {kind}: {why}. "
                "Leave scaler.step and scaler.update out, and call passes(scaler=scaler)"
            )
        if schedule is not None:
            raise RuntimeError(
                "scaler.step(optimizer) in a step with a rule such as WhenSteep, which looks at the first gradient "
                "before the scale is known: leave scaler.step and scaler.update out, and call passes(scaler=scaler)"
            )
        if self.unscaled and recipe.passes > 1:
            raise RuntimeError(
                f"scaler.unscale_ was called for one pass of {recipe.name}, and the gradients of the others are "
                "scaled: leave it out; to clip, construct the optimizer with clip_grad_norm="
            )

    def check_pass(self, where: str) -> None:
        """The gradients of a pass are scaled, as far as can be known."""

    def inverse(self, device: torch.device) -> Tensor:
        """Return the factor that unscales a gradient, a 0-dim tensor."""
        return self._inverse.to(device)

    def report(self, finite: bool, device: torch.device) -> None:
        """The scaler has looked for itself."""


class _Scaled(NamedTuple):
    """How a scaler stood when it scaled last."""

    time: int
    thread: int
    version: int
    unscaled: int


_last: weakref.WeakKeyDictionary[torch.amp.GradScaler, _Scaled] = weakref.WeakKeyDictionary()
_clock = itertools.count(1)


def _noting(scale: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(scale)
    def noting(self: Any, outputs: Any) -> Any:
        scaled = scale(self, outputs)
        factor = getattr(self, "_scale", None)  # a disabled one has none
        if factor is not None and not torch.compiler.is_compiling():
            version = -1 if factor.is_inference() else factor._version
            _last[self] = _Scaled(next(_clock), threading.get_ident(), version, len(self._per_optimizer_states))
        return scaled

    return noting


@functools.cache
def _watched() -> Callable[..., Any]:
    """From now on, note when a scaler scales: wrap ``torch.amp.GradScaler.scale``, and return the wrapper.

    A loss that was scaled leaves no other trace of it, and a step that is not told takes its gradient for the true one.
    """
    torch.amp.GradScaler.scale = _noting(torch.amp.GradScaler.scale)  # type: ignore[method-assign]
    return torch.amp.GradScaler.scale


def now() -> int:
    """The time on the clock of :func:`check_not_forgotten`, which every call of it moves on."""
    _watched()
    return next(_clock)


def check_not_forgotten(since: int, optimizer: object, passes: int) -> None:
    """Check, after the passes of a step without a scaler, that no loss was scaled in them.

    Args:
        since: the time before the passes.
        optimizer: the optimizer that takes the step.
        passes: how many the step has.

    Raises:
        RuntimeError: this thread has scaled a loss, and its scaler neither unscaled gradients nor was updated since.

    >>> scaler, since = torch.amp.GradScaler("cpu"), now()
    >>> _ = scaler.scale(torch.ones(()))
    >>> check_not_forgotten(since, None, passes=1)
    Traceback (most recent call last):
    RuntimeError: a loss was scaled in a step by a GradScaler that the step was not given: ...
    """
    if not len(_last):  # sooner told than the items listed
        return
    for scaler, last in list(_last.items()):
        factor, known = scaler._scale, scaler._per_optimizer_states
        if last.time < since or last.thread != threading.get_ident() or factor is None or last.version < 0:
            continue
        if factor._version == last.version and (len(known) == last.unscaled or (passes > 1 and id(optimizer) in known)):
            raise RuntimeError(
                f"a loss was scaled in a step by a {type(scaler).__name__} that the step was not given: its "
                "direction would be too long by that scale. Write passes(scaler=scaler) or "
                "step(closure, scaler=scaler), and leave scaler.unscale_, scaler.step and scaler.update out. (If it "
                "was the loss of another optimizer: scale that outside of the step)"
            )


class LossScale:
    """One step under a gradient scaler, which it updates.

    All passes of a step have one scale, and what is made of their gradients is linear in it or does not depend on it.
    So the gradients stay scaled until the last of them is there; only what the direction is combined from is unscaled.

    Args:
        scaler: a :class:`torch.amp.GradScaler`, or what has its methods.
        optimizer: whom the user would hand to ``scaler.unscale_``.

    Raises:
        TypeError: it is no gradient scaler.
    """

    def __init__(self, scaler: Any, optimizer: object) -> None:
        if isinstance(scaler, type) or not all(callable(getattr(scaler, name, None)) for name in _NEEDED):
            hint = " (a closure is for step(closure))" if inspect.isroutine(scaler) else ""
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {scaler!r}{hint}")
        self._scaler = scaler
        self._optimizer = optimizer
        self._inverse: Tensor | None = None
        self._since = now()

    @property
    def enabled(self) -> bool:
        """Whether it scales at all."""
        return bool(self._scaler.is_enabled())

    def scale(self, loss: Tensor) -> Tensor:
        """The scaled loss."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def check_pass(self, where: str) -> None:
        """After a pass: that its loss was scaled, and its gradient was not unscaled.

        Raises:
            RuntimeError: ``scaler.unscale_`` was called for this optimizer, or (where that can be seen) no loss was
                scaled in the pass.
        """
        if id(self._optimizer) in getattr(self._scaler, "_per_optimizer_states", {}):
            raise RuntimeError(
                f"scaler.unscale_ was called in {where}: given the scaler, a step unscales by itself; to clip, "
                "construct the optimizer with clip_grad_norm="
            )
        since, self._since = self._since, now()
        if getattr(type(self._scaler), "scale", None) is _watched() and (
            self._scaler not in _last or _last[self._scaler].time < since
        ):
            raise RuntimeError(
                f"no loss was scaled in {where}: call turn.backward(loss) or scaler.scale(loss).backward() in every "
                "pass, or do without scaler="
            )

    def inverse(self, device: torch.device) -> Tensor:
        """Return the factor that unscales a gradient, a 0-dim tensor; nothing waits for the device."""
        if self._inverse is None:
            one = torch.ones((), dtype=torch.float32, device=device)
            self._inverse = self._scaler.scale(one).reciprocal()
            self._since = now()
        return self._inverse.to(device)

    def report(self, finite: bool, device: torch.device) -> None:
        """Tell the scaler how the step went, and let it choose the scale of the next."""
        if self._inverse is None:
            self.inverse(device)  # makes the scale, if nobody has yet
        self._scaler.unscale_(_Outcome(finite, device))
        self._scaler.update()
