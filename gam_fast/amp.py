"""Loss scaling: what a step has to do with a :class:`torch.amp.GradScaler`."""

from __future__ import annotations

from typing import Any

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
    """

    def __init__(self, grad_scale: Tensor | None) -> None:
        self.unscaled = grad_scale is None
        self._inverse = torch.ones(()) if grad_scale is None else grad_scale.float().reciprocal()

    @classmethod
    def handed_to(cls, optimizer: object) -> GivenScale | None:
        """What was handed to the optimizer, if anything was. After an error torch leaves it there, see :meth:`drop`."""
        given = vars(optimizer)
        return cls(given["grad_scale"]) if "found_inf" in given else None

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
