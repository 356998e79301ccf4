"""The base optimizer: made from a class with its arguments, or one or several instances that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .chain import Chain, members
from .hooks import Hooked

Instances: TypeAlias = "torch.optim.Optimizer | list[torch.optim.Optimizer] | tuple[torch.optim.Optimizer, ...]"
Given: TypeAlias = "Instances | Callable[..., torch.optim.Optimizer]"
"""A base optimizer as the user gives it."""

_FILLED = "_gam_fast_filled"
"""The attribute of a base optimizer that has for each group the keys which an optimizer around it has put there."""


def build_base(
    params: Iterable[Any] | None,
    base_optimizer: Given,
    arguments: dict[str, Any],
) -> torch.optim.Optimizer:
    """The base optimizer of ``params`` (``None`` with an instance); errors: those of the optimizer around it."""
    if isinstance(base_optimizer, list | tuple):
        base_optimizer = _chained(base_optimizer)
    if isinstance(base_optimizer, torch.optim.Optimizer):
        base = base_optimizer
        if arguments:
            raise TypeError(
                f"unexpected arguments {', '.join(sorted(arguments))}: base_optimizer is an instance or several, which "
                "have their own"
            )
        if params is not None and _ids(params) != _ids(base.param_groups):
            raise ValueError("base_optimizer is an instance over other parameters than params; pass params=None")
    elif callable(base_optimizer):
        if params is None:
            raise TypeError("params may be None only with an instance of an optimizer as base_optimizer")
        base = base_optimizer(params, **arguments)
    else:
        raise TypeError(f"base_optimizer must be a torch optimizer class or instance, got {base_optimizer!r}")
    for member in members(base):
        _check(member)
    return base


def is_instance(base_optimizer: Given) -> bool:
    """Return whether it is made already, and not a class."""
    return isinstance(base_optimizer, torch.optim.Optimizer | list | tuple)


def _chained(optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    chain = Chain(optimizers)
    return chain if len(chain.members) > 1 else chain.members[0]


def _check(base: torch.optim.Optimizer) -> None:
    if not isinstance(base, torch.optim.Optimizer) or isinstance(base, Hooked):
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


def filled(base: torch.optim.Optimizer) -> list[set[str]]:
    """For each group, the keys that optimizers around ``base`` have put there; they may be added to.

    It is not in the ``state_dict``.

    >>> base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
    >>> filled(base)[0].add("rho")
    >>> filled(base)
    [{'rho'}]
    """
    found: list[set[str]] = []
    for member in members(base):
        record: list[set[str]] = vars(member).setdefault(_FILLED, [])
        record.extend(set() for _ in member.param_groups[len(record) :])
        found += record
    return found


def left_behind(base: torch.optim.Optimizer, explicit: Mapping[str, Any]) -> list[set[str]]:
    """For each group, the keys that an optimizer around ``base`` before has left there, which no longer count.

    Where that is not known (``base`` was copied or pickled), a value that all groups share counts as such if there is
    an explicit one in its place: ``explicit`` has those.
    """
    found = [set(keys) for keys in filled(base)]
    for key in explicit:
        values = [group.get(key) for group in base.param_groups]
        if values[0] is not None and all(value == values[0] for value in values):
            for keys in found:
                keys.add(key)
    return found


def _ids(params: Iterable[Any]) -> set[int]:
    found = set()
    for entry in params:
        values = entry["params"] if isinstance(entry, dict) else [entry]
        values = [values] if isinstance(values, Tensor) else values
        found |= {id(value[1] if isinstance(value, tuple) else value) for value in values}
    return found
