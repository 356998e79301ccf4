"""Parameters of the model that belong to another optimizer: they get the gradient of one pass, not the sum of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import data_parallel
from .ownership import may_be_part, parts_of_buffers, version

RUNNING: dict[int, Sequence[Tensor]] = {}
"""The parameters of each step under way: steps of several optimizers may go side by side."""


@dataclass
class _Count:
    steps: int = 0


CLOSED = _Count()
"""How many steps of any optimizer are over: each may have left gradients in parameters of another."""


class Surroundings:
    """What a step must know of ``model`` besides its own parameters; looked for anew where model or groups changed."""

    def __init__(self) -> None:
        self.others: list[Tensor] = []
        """The parameters of the model that are in no parameter group."""
        self.has_bucket_views = False
        """Whether the model is a DistributedDataParallel whose gradients are views of its buckets."""
        self._model: nn.Module | None = None
        self._seen: tuple[int, ...] = ()
        self._tables: list[dict[str, Any]] = []  # of parameters and submodules, by module

    def look(self, model: nn.Module | None, groups: Sequence[dict[str, Any]]) -> Surroundings:
        """Bring it up to date. In most steps nothing but a few lengths is compared."""
        if model is None:
            self.others, self.has_bucket_views, self._model = [], False, None
            return self
        if model is not self._model or self._seen != self._lengths(model, groups):
            own = {id(param) for group in groups for param in group["params"]}
            self.others = [param for param in model.parameters() if id(param) not in own]
            parallel = data_parallel(model)
            self.has_bucket_views = parallel is not None and parallel.gradient_as_bucket_view
            self._tables = [table for module in model.modules() for table in (module._parameters, module._modules)]
            self._model, self._seen = model, self._lengths(model, groups)
        return self

    def _lengths(self, model: nn.Module, groups: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        own = sum([len(group["params"]) for group in groups])
        return own, sum(map(len, self._tables)), *map(id, chain(model._parameters.values(), model._modules.values()))


@dataclass(frozen=True)
class Held:
    """A gradient at some time: the tensor (or none), its version, and a copy of its elements where that is needed."""

    grad: Tensor | None
    version: int = 0
    values: Tensor | None = None

    @staticmethod
    def of(grad: Tensor | None, *, copied: bool) -> Held:
        if grad is None:
            return Held(None)
        return Held(grad, version(grad), grad.detach().clone() if copied else None)

    def give_back(self, param: Tensor) -> None:
        """The parameter has the gradient again, as it was."""
        param.grad = self.grad
        if self.grad is not None and self.values is not None and version(self.grad) != self.version:
            self.grad.copy_(self.values)


class OtherGradients:
    """The gradients of other parameters in one step.

    In the pass that counts, backward adds to what was there before the step, as in plain torch. The gradients of the
    other passes are thrown away.

    Args:
        params: the other parameters.
        own: the parameters of the step.
    """

    def __init__(self, params: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        # most that do not require a gradient never get one
        self.params: Sequence[Tensor] = ()
        if params:
            self.params = [param for param in params if param.requires_grad or param.grad is not None]
        self._own = own
        self._before: dict[Tensor, Held] | None = None
        self._first: dict[Tensor, Held] | None = None

    def begin(self, *, keep_last: bool) -> None:
        """Before a pass; with ``keep_last`` the last pass counts, else the first."""
        RUNNING[id(self)] = self._own
        if not self.params:
            return
        params = self._mine()
        with torch.no_grad():
            if self._before is None:
                self._before = {param: Held.of(param.grad, copied=True) for param in params}
            elif self._first is None and keep_last:
                for param in params:
                    self._before[param].give_back(param)
            else:
                self._throw_away(params)

    def _throw_away(self, params: Sequence[Tensor]) -> None:
        """Clear the gradients, and hold those of the first pass. A part of somebody's buffer is zeroed."""
        in_buffers = [param for param in params if param.grad is not None and may_be_part(param.grad)]
        are_parts = parts_of_buffers([param.grad for param in in_buffers if param.grad is not None])
        parts = {param for param, is_part in zip(in_buffers, are_parts, strict=True) if is_part}
        if self._first is None:
            self._first = {param: Held.of(param.grad, copied=param in parts) for param in params}
        for param in params:
            if param in parts and param.grad is not None:
                param.grad.zero_()
            else:
                param.grad = None

    def finish(self) -> None:
        """The step was taken."""
        if self._first is not None:
            self._give_back(self._first)

    def close(self, *, undone: bool) -> None:
        """The step is over; where it was undone, all is as it was before."""
        if undone and self._before is not None:
            self._give_back(self._before)
        RUNNING.pop(id(self), None)
        CLOSED.steps += 1

    def _give_back(self, held: dict[Tensor, Held]) -> None:
        with torch.no_grad():
            for param in self._mine():
                held[param].give_back(param)

    def _mine(self) -> Sequence[Tensor]:
        """The parameters without those that another step has taken up: it sees to their gradients."""
        if len(RUNNING) > 1:
            taken = {id(param) for key, params in RUNNING.items() if key != id(self) for param in params}
            self.params = [param for param in self.params if id(param) not in taken]
        return self.params
