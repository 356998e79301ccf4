"""The base optimizer: made from a class with its arguments, or an instance that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .stepping import Stepper


def build_base(
    params: Iterable[Any] | None,
    base_optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer],
    arguments: dict[str, Any],
) -> torch.optim.Optimizer:
    """The base optimizer of ``params`` (``None`` with an instance); errors: those of the optimizer around it."""
    if isinstance(base_optimizer, torch.optim.Optimizer):
        base = base_optimizer
        if arguments:
            raise TypeError(
                f"unexpected arguments {', '.join(sorted(arguments))}: base_optimizer is an instance, which has its own"
            )
        if params is not None and _ids(params) != _ids(base.param_groups):
            raise ValueError("base_optimizer is an instance over other parameters than params; pass params=None")
    elif callable(base_optimizer):
        if params is None:
            raise TypeError("params may be None only with an instance of an optimizer as base_optimizer")
        base = base_optimizer(params, **arguments)
    else:
        raise TypeError(f"base_optimizer must be a torch optimizer class or instance, got {base_optimizer!r}")
    if not isinstance(base, torch.optim.Optimizer) or isinstance(base, Stepper):
        raise TypeError(f"base_optimizer must make a torch optimizer that is not one of gam_fast, got {base!r}")
    if isinstance(base, torch.optim.LBFGS | torch.optim.SparseAdam):
        why = "evaluates its own closure" if isinstance(base, torch.optim.LBFGS) else "needs sparse gradients"
        raise TypeError(
            f"{type(base).__name__} cannot be the base optimizer, because it {why}; use SGD, AdamW or another"
        )
    if getattr(base, "_overlap_with_ddp", False):
        raise TypeError(
            f"{type(base).__name__} with overlap_with_ddp=True cannot be the base optimizer, because it steps in the "
            "backward pass; leave that out"
        )
    return base


def _ids(params: Iterable[Any]) -> set[int]:
    found = set()
    for entry in params:
        values = entry["params"] if isinstance(entry, dict) else [entry]
        values = [values] if isinstance(values, Tensor) else values
        found |= {id(value[1] if isinstance(value, tuple) else value) for value in values}
    return found
