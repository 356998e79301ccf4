"""The step hooks of torch's optimizers, of one and of all optimizers, called around the update of a step.

Torch calls them around ``step()``. A step of several passes has its direction only after the last pass, so here they
are called around the update, no matter which code drives the passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

Call: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
"""Positional arguments, starting with the optimizer, and keyword arguments of a call of ``step()``."""


class Hooked(Optimizer):
    """An optimizer that calls its pre-hooks itself, just before it updates the parameters."""

    _progress: Any

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``step()``, as torch does, for the profiler and for the post-hooks of a step that was taken."""

        @functools.wraps(func)
        def wrapper(self: Hooked, *args: Any, **kwargs: Any) -> Any:
            if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]  # a profiler range that is not recorded takes 9 µs
                return self._with_hooks(func, *args, **kwargs)
            with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
                return self._with_hooks(func, *args, **kwargs)

        return wrapper

    def _with_hooks(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        progress = self._progress
        progress.updated = None  # left by a step that raised
        outer, progress.call = progress.call, ((self, *args), kwargs)
        try:
            out = func(self, *args, **kwargs)
        finally:
            progress.call = outer
        self._optimizer_step_code()
        updated, progress.updated = progress.updated, None
        if updated is not None:
            call_after(self, updated)
        return out


_TORCHS_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__


def any_before(optimizer: Optimizer) -> bool:
    """Return whether this optimizer's update has a pre-hook."""
    return bool(_global_optimizer_pre_hooks or optimizer._optimizer_step_pre_hooks)


def call_before(optimizer: Optimizer, call: Call) -> None:
    """Call the pre-hooks of all optimizers and those of this one.

    Raises:
        RuntimeError: a hook returned new arguments for ``step()``, but the closure has already been evaluated.
    """
    for hook in (*_global_optimizer_pre_hooks.values(), *optimizer._optimizer_step_pre_hooks.values()):
        result = hook(optimizer, *call)
        if result is not None and (not isinstance(result, tuple) or result != call):
            raise RuntimeError(
                f"a step pre-hook of {type(optimizer).__name__} returned other arguments for step() (a "
                f"{type(result).__name__}): it runs just before the update, after the closure was called, "
                "and must return None; pass the arguments to step() itself"
            )


def call_after(optimizer: Optimizer, call: Call) -> None:
    """Call the post-hooks of this optimizer and those of all."""
    for hook in (*optimizer._optimizer_step_post_hooks.values(), *_global_optimizer_post_hooks.values()):
        hook(optimizer, *call)


def step_of_base(base: Optimizer) -> None:
    """Call ``base.step()`` with its own hooks only; the optimizer around it has called those of all optimizers."""
    step = type(base).step
    patched = "step" in vars(base) and not hasattr(base.step, "_wrapped_by_lr_sched")
    everywhere = _global_optimizer_pre_hooks or _global_optimizer_post_hooks
    if not everywhere or patched or getattr(step, "__code__", None) is not _TORCHS_WRAPPER:
        base.step()
        return
    base._opt_called = True  # type: ignore[attr-defined]  # as the wrapper of a scheduler constructed on the base does
    call: Any = ((base,), {})
    for pre_hook in base._optimizer_step_pre_hooks.values():
        call = pre_hook(base, *call) or call
    args, kwargs = call
    step.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]
    for post_hook in base._optimizer_step_post_hooks.values():
        post_hook(base, *call)
