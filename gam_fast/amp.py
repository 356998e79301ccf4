"""Loss scaling: steps under a :class:`torch.amp.GradScaler`."""

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
    """Stand-in optimizer for ``GradScaler.unscale_``; its one gradient tells whether the step was finite."""

    def __init__(self, finite: bool, device: torch.device) -> None:
        param = torch.zeros(1, device=device)
        param.grad = torch.full((1,), 0.0 if finite else float("inf"), device=device)
        self.param_groups = [{"params": [param]}]


class GivenScale:
    """The loss scale of a step that is called by ``scaler.step(optimizer)``, as frameworks do.

    torch passes the scale in the optimizer's attributes ``grad_scale`` and ``found_inf``, as for its own fused
    optimizers. The optimizer unscales the gradients and skips the step if needed. The caller updates the scaler.

    Args:
        grad_scale: the scale of the gradients; ``None`` if they were unscaled already.
        found_inf: a number other than 0 if the step is to be skipped; ``None`` if the gradients alone say so.

    Attributes:
        total: a number that joins the sums that must be finite; it is infinite if the step is to be skipped.
    """

    def __init__(self, grad_scale: Tensor | None, found_inf: Tensor | None = None) -> None:
        self.unscaled = grad_scale is None
        self.total = None if found_inf is None else (torch.as_tensor(found_inf) == 0).all().float().reciprocal()
        self._inverse = torch.ones(()) if grad_scale is None else grad_scale.float().reciprocal()

    @classmethod
    def handed_to(cls, optimizer: object) -> GivenScale | None:
        """Return the scale that torch passed, or None. After an error torch leaves it in place: call :meth:`drop`."""
        given = vars(optimizer)
        scale, found_inf = given.get("grad_scale"), given.get("found_inf")
        return None if scale is None and found_inf is None else cls(scale, found_inf)

    @staticmethod
    def drop(optimizer: object) -> None:
        """Delete the attributes that a failed call has left on the optimizer."""
        for name in ("grad_scale", "found_inf"):
            vars(optimizer).pop(name, None)

    def scale(self, loss: Tensor) -> Tensor:
        """Return the loss itself: the caller of ``scaler.step`` scales it."""
        return loss

    def check_serves(self, recipe: Recipe, schedule: object, *, is_local: bool) -> None:
        """Refuse a step that must unscale its gradients before ``scaler.step``.

        Raises:
            RuntimeError: the step is local, of second order, or needs the length of its first gradient (for its
                formula or for a decision); or the scaler has unscaled the gradients of one of several passes.
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
        """Check nothing: the gradients of a pass are taken to be scaled."""

    def inverse(self, device: torch.device) -> Tensor:
        """Return the factor that unscales a gradient, a 0-dim tensor."""
        return self._inverse.to(device)

    def report(self, finite: bool, device: torch.device) -> None:
        """Do nothing: the scaler checks for infinity itself."""


class _Scaled(NamedTuple):
    """State of a scaler at its last ``scale`` call."""

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
        factor = getattr(self, "_scale", None)  # a disabled scaler has none
        if factor is not None and not torch.compiler.is_compiling():
            version = -1 if factor.is_inference() else factor._version
            _last[self] = _Scaled(next(_clock), threading.get_ident(), version, len(self._per_optimizer_states))
        return scaled

    return noting


@functools.cache
def _watched() -> Callable[..., Any]:
    """Wrap ``torch.amp.GradScaler.scale`` to record each call, and return the wrapper.

    A scaled loss leaves no other trace, and a step that is not given the scaler would take its gradient as unscaled.
    """
    torch.amp.GradScaler.scale = _noting(torch.amp.GradScaler.scale)  # type: ignore[method-assign]
    return torch.amp.GradScaler.scale


def now() -> int:
    """Advance the clock of :func:`check_not_forgotten` and return its time."""
    _watched()
    return next(_clock)


def pending(since: int = 0) -> list[torch.amp.GradScaler]:
    """Return the scalers by which this thread has scaled a loss since then, and that were not updated afterwards."""
    return [
        scaler
        for scaler, last in list(_last.items())
        if last.time >= since and last.thread == threading.get_ident() and last.version >= 0
        if scaler._scale is not None and scaler._scale._version == last.version
    ]


def check_not_forgotten(since: int, optimizer: object, passes: int) -> None:
    """Check that no loss was scaled in the passes of a step without a scaler.

    Args:
        since: the time before the passes.
        optimizer: the optimizer that takes the step.
        passes: how many the step has.

    Raises:
        RuntimeError: this thread has scaled a loss since, and its scaler was neither updated nor asked to unscale.

    >>> scaler, since = torch.amp.GradScaler("cpu"), now()
    >>> _ = scaler.scale(torch.ones(()))
    >>> check_not_forgotten(since, None, passes=1)
    Traceback (most recent call last):
    RuntimeError: a loss was scaled in a step by a GradScaler that the step was not given: ...
    """
    for scaler in pending(since) if len(_last) else ():  # the length is faster than a list of the items
        known = scaler._per_optimizer_states
        if len(known) == _last[scaler].unscaled or (passes > 1 and id(optimizer) in known):
            raise RuntimeError(
                f"a loss was scaled in a step by a {type(scaler).__name__} that the step was not given: its "
                "direction would be too long by that scale. Write passes(scaler=scaler) or "
                "step(closure, scaler=scaler), and leave scaler.unscale_, scaler.step and scaler.update out. (If it "
                "was the loss of another optimizer: scale that outside of the step)"
            )


class LossScale:
    """The loss scale of one step that was given a gradient scaler. The step also updates the scaler.

    All passes of a step share one scale. Every intermediate result is linear in the gradients or independent of their
    scale. So the gradients stay scaled until the last pass; only the terms of the final direction are unscaled.

    Args:
        scaler: a :class:`torch.amp.GradScaler`, or an object with its methods.
        optimizer: the optimizer that the user would pass to ``scaler.unscale_``.

    Raises:
        TypeError: ``scaler`` is not a gradient scaler.
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
        """True if the scaler is enabled."""
        return bool(self._scaler.is_enabled())

    def scale(self, loss: Tensor) -> Tensor:
        """Return the scaled loss."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def check_pass(self, where: str) -> None:
        """Check after a pass that its loss was scaled and its gradient was not unscaled.

        Raises:
            RuntimeError: ``scaler.unscale_`` was called for this optimizer, or (if the scaler shows it) no loss was
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
        """Return the factor that unscales a gradient, a 0-dim tensor, without waiting for the device."""
        if self._inverse is None:
            one = torch.ones((), dtype=torch.float32, device=device)
            self._inverse = self._scaler.scale(one).reciprocal()
            self._since = now()
        return self._inverse.to(device)

    def report(self, finite: bool, device: torch.device) -> None:
        """Tell the scaler whether the step was finite, and let it choose the next scale."""
        if self._inverse is None:
            self.inverse(device)  # creates the scale if it does not exist yet
        self._scaler.unscale_(_Outcome(finite, device))
        self._scaler.update()
