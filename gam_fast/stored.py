"""Vectors that outlive a step: tensors in the base optimizer's state, viewed per block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends.base import TensorList
from .distributed import local, spread
from .ownership import lies_as, version
from .parameters import ParameterBlock

State: TypeAlias = "Mapping[Tensor, dict[str, Any]]"

MOMENTA = ("momentum_buffer", "exp_avg")
"""The keys of the momentum in the state of torch's and most other optimizers."""


@dataclass
class Stored:
    """The vector of one block.

    Attributes:
        values: for each parameter its part, with the parameter's dtype and strides; zeros if it has none yet.
        new: the indices of parameters that have none yet.
        made: tensors that are not in the state yet, by index.
    """

    values: TensorList
    new: list[int] = field(default_factory=list)
    made: dict[int, Tensor] = field(default_factory=dict)


def find(param: Tensor, names: Sequence[str], state: State) -> Tensor | None:
    """Return the first tensor in the parameter's state that has one of the names."""
    own = state[param] if param in state else {}  # noqa: SIM401 - get() of a chain would make an entry
    return next((own[name] for name in names if isinstance(own.get(name), Tensor)), None)


def of_block(block: ParameterBlock, names: Sequence[str], state: State) -> Stored:
    """Return the vector of a block, as a step or a checkpoint has left it in the state."""
    found, values = Stored([]), []
    for i, (owner, part) in enumerate(zip(block.owners, block.params, strict=True)):
        value = find(owner, names, state)
        if value is None:
            found.new.append(i)
            found.made[i] = torch.zeros_like(owner, memory_format=torch.preserve_format, requires_grad=False)
            value = found.made[i]
        if value.shape != owner.shape:
            raise RuntimeError(
                f"the state has a {' or '.join(names)} of shape {tuple(value.shape)} for a parameter of shape "
                f"{tuple(owner.shape)}: it was loaded from another model"
            )
        value = local(value)
        if value.dtype is not part.dtype or value.device != part.device or not lies_as(value, part):
            value = torch.empty_like(part, requires_grad=False).copy_(value)
            found.made[i] = spread(value, owner)
        values.append(value)
    found.values = block.backend.bookkeeping.hold(values)
    return found


def make(params: Iterable[Tensor], name: str, state: State) -> dict[Tensor, tuple[Tensor, int]]:
    """Create zero vectors for the parameters that have a gradient, so that a checkpoint can fill them.

    Return the parameters, with their tensors and versions.
    """
    made = {}
    for param in params:
        if param.grad is not None and find(param, (name,), state) is None:
            value = torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
            state[param][name] = value
            made[param] = value, version(local(value))
    return made


def forget(made: Mapping[Tensor, tuple[Tensor, int]], name: str, base: Optimizer) -> None:
    """Remove the tensors of :func:`make` that no checkpoint has filled."""
    for param, (value, then) in made.items():
        if find(param, (name,), base.state) is value and version(local(value)) == then:
            del base.state[param][name]


def put(block: ParameterBlock, name: str, stored: Stored, state: State) -> None:
    """Put the newly made tensors into the state."""
    for i, value in stored.made.items():
        state[block.owners[i]][name] = value
