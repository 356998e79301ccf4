"""Loss scaling: what a step has to do with a :class:`torch.amp.GradScaler`."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

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
        """What was handed to the optimizer, if anything was. After an error torch leaves it there, see :meth:`drop`."""
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

    def check_pass(self, where: str) -> None:
        """The gradients of a pass are scaled, as far as can be known."""

    def inverse(self, device: torch.device) -> Tensor:
        """What unscales a gradient, a 0-dim tensor."""
        return self._inverse.to(device)

    def report(self, finite: bool, device: torch.device) -> None:
        """The scaler has looked for itself."""


Fresh: TypeAlias = "list[weakref.ref[torch.amp.GradScaler]]"
"""Scalers that have not scaled a loss."""

_references = -1
"""How many references the classes of scalers have where no scaler is alive; each has one more."""


def fresh_scalers() -> Fresh:
    """All of torch's gradient scalers that are enabled and have not scaled anything yet.

    It takes microseconds while no scaler is alive, after the first call of a process, and else a search through all
    objects, some tens of milliseconds.

    >>> scaler = torch.amp.GradScaler("cpu")
    >>> [found() is scaler for found in fresh_scalers()]
    [True]
    >>> scaler.scale(torch.ones(())), fresh_scalers()
    (tensor(65536.), [])
    """
    global _references
    classes = list(_with_subclasses(torch.amp.GradScaler))
    references = sum(map(sys.getrefcount, classes))
    if references == _references:
        return []
    found = [each for each in gc.get_referrers(*classes) if issubclass(type(each), torch.amp.GradScaler)]
    _references = references - len(found)
    return [weakref.ref(scaler) for scaler in found if scaler.is_enabled() and scaler._scale is None]


def _with_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for each in cls.__subclasses__():
        yield from _with_subclasses(each)


def check_not_forgotten(fresh: Fresh, optimizer: object, passes: int) -> None:
    """Check, after the passes of a step without a scaler, that none of ``fresh`` has scaled the loss.

    Args:
        fresh: from :func:`fresh_scalers`, before the passes.
        optimizer: the optimizer that takes the step.
        passes: how many the step has.

    Raises:
        RuntimeError: one has scaled for the first time, and neither unscaled gradients nor was updated since.
    """
    for reference in fresh:
        scaler = reference()
        if scaler is None or scaler._scale is None or scaler._scale.is_inference() or scaler._scale._version > 0:
            continue
        known = scaler._per_optimizer_states
        if not known or (passes > 1 and id(optimizer) in known):
            raise RuntimeError(
                f"a loss was scaled in a step by a {type(scaler).__name__} that the step was not given: its "
                f"direction would be {scaler._init_scale:g} times too long. Write passes(scaler=scaler) or "
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
        if not all(callable(getattr(scaler, name, None)) for name in _NEEDED):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {scaler!r}")
        self._scaler = scaler
        self._optimizer = optimizer
        self._inverse: Tensor | None = None

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
                scaled.
        """
        if id(self._optimizer) in getattr(self._scaler, "_per_optimizer_states", {}):
            raise RuntimeError(
                f"scaler.unscale_ was called in {where}: given the scaler, a step unscales by itself; to clip, "
                "construct the optimizer with clip_grad_norm="
            )
        if self._inverse is None and getattr(self._scaler, "_scale", self) is None:
            raise RuntimeError(
                f"no loss was scaled in {where}: call turn.backward(loss) or scaler.scale(loss).backward() in every "
                "pass, or do without scaler="
            )

    def inverse(self, device: torch.device) -> Tensor:
        """What unscales a gradient, a 0-dim tensor; nothing waits for the device."""
        if self._inverse is None:
            one = torch.ones((), dtype=torch.float32, device=device)
            self._inverse = self._scaler.scale(one).reciprocal()
        return self._inverse.to(device)

    def report(self, finite: bool, device: torch.device) -> None:
        """Tell the scaler how the step went, and let it choose the scale of the next."""
        if self._inverse is None:
            self.inverse(device)  # makes the scale, if nobody has yet
        self._scaler.unscale_(_Outcome(finite, device))
        self._scaler.update()
