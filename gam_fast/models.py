"""The model around the parameters: of a copy, or where none was given; and what of it belongs to another optimizer."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from inspect import CO_OPTIMIZED
from itertools import chain
from types import CellType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import data_parallel
from .ownership import may_be_part, parts_of_buffers, version

LIMIT = 1000
"""So many objects are looked at for a model that was not given."""

DEPTH = 3
"""So far from a name: a model in a list in an attribute of ``self``."""

RUNNING: dict[int, Sequence[Tensor]] = {}
"""The parameters of each step under way: steps of several optimizers may go side by side."""


@dataclass
class _Count:
    steps: int = 0


CLOSED = _Count()
"""How many steps of any optimizer are over: each may have left gradients in parameters of another."""


class ModelOfCopy:
    """Stands for the module of an optimizer that is copied or pickled, without being a copy of it.

    A deep copy refers to the copy of the module if that was made in the same call before. A pickle holds no more than
    the name of the module's class; :meth:`find` looks for the module that came with the parameters.

    It ``matters`` where steps without it would go wrong without a sign: it has buffers, or synchronises processes.
    """

    def __init__(self, module: nn.Module | None, name: str, matters: bool) -> None:
        self.module = module
        self.name = name
        self.matters = matters

    @classmethod
    def of(cls, module: nn.Module | None, *, matters: bool) -> ModelOfCopy | None:
        """For an optimizer with this ``model``; ``matters`` besides where it has buffers."""
        if module is None:
            return None
        return cls(module, type(module).__qualname__, matters or next(module.buffers(), None) is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelOfCopy:
        return ModelOfCopy(memo.get(id(self.module)), self.name, self.matters)

    def __reduce__(self) -> tuple[Callable[..., ModelOfCopy], tuple[None, str, bool]]:
        return ModelOfCopy, (None, self.name, self.matters)

    def find(self, params: Iterable[Tensor]) -> nn.Module | None:
        """The module in memory that holds the most of the parameters; of several one of the right name, then the least.

        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> ModelOfCopy(None, "Sequential", matters=True).find(model.parameters()) is model
        True
        """
        if self.module is not None:
            return self.module
        ours = {id(param) for param in params}
        best: tuple[tuple[int, bool, int], nn.Module | None] = ((0, False, 0), None)
        for module in gc.get_objects():
            if issubclass(type(module), nn.Module) and "_parameters" in vars(module):
                theirs = {id(param) for param in module.parameters()}
                rank = (len(ours & theirs), type(module).__qualname__ == self.name, -sum(1 for _ in module.modules()))
                if rank[0] and rank > best[0]:
                    best = rank, module
        return best[1]


def modules_in_reach(params: Sequence[Tensor]) -> list[nn.Module]:
    """The modules that have one of ``params`` and that a function now running has a name for.

    No hook is registered for that, which would make a compiled model compile again.

    >>> model = nn.Linear(2, 1)
    >>> modules_in_reach(list(model.parameters())) == [model]
    True
    """
    if sys.gettrace() is not None:  # a debugger may hold the snapshots that are cleared here
        return []
    ours = {id(param) for param in params}
    found: list[nn.Module] = []
    seen: set[int] = set()
    level = list(_names())
    for _ in range(DEPTH + 1):
        following: list[Any] = []
        for value in level:
            if id(value) in seen or len(seen) > LIMIT:
                continue
            seen.add(id(value))
            kind = type(value)
            if issubclass(kind, nn.Module):
                if any(id(param) in ours for param in value.parameters()):
                    found.append(value)
            elif not issubclass(kind, Tensor | ModuleType | type | str | bytes | int | float):
                following.extend(_parts(value))
        level = following
    return found


def message_of_forgotten(method: str, buffers: Sequence[str]) -> str:
    """Say which buffers have moved in every pass, and what to do about it."""
    return (
        f"the forward moves buffers of the module that this {method} trains ({', '.join(buffers[:4])}"
        f"{', …' if len(buffers) > 4 else ''}), in each pass of a step: construct it with model=model, or set "
        "optimizer.model, so that they move once a step, as running statistics should (freeze_running_statistics="
        "False if they should not)"
    )


def _names() -> Iterator[Any]:
    """The values of the variables of the functions that are running: local ones, and global ones of the nearest."""
    frame, nearest = sys._getframe(2), True
    while frame is not None:
        yield from _locals(frame)
        is_users = frame.f_globals.get("__name__", "").split(".")[0] not in ("gam_fast", "torch", "contextlib")
        if is_users and nearest:
            yield from frame.f_globals.values()
            nearest = False
        frame = frame.f_back  # type: ignore[assignment]


def _locals(frame: FrameType) -> list[Any]:
    named = frame.f_locals
    found = list(named.values())
    if sys.version_info < (3, 13) and frame.f_code.co_flags & CO_OPTIMIZED:
        named.clear()  # a snapshot, which would keep all these alive for as long as the function runs
    return found


def _parts(value: Any) -> Iterable[Any]:
    """The objects that one holds."""
    kind = type(value)
    if issubclass(kind, dict):
        return list(value.values())
    if issubclass(kind, list | tuple):
        return list(value)
    if kind is MethodType:
        return (value.__self__,)
    if kind is FunctionType:
        return [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # not one that is empty
    try:
        inside = object.__getattribute__(value, "__dict__")  # without what the object does when it is asked
    except AttributeError:
        return ()
    return list(inside.values()) if isinstance(inside, dict) else ()


class Surroundings:
    """The rest of ``model``, as far as a step must know it; looked for anew where model or groups changed."""

    def __init__(self) -> None:
        self.others: list[Tensor] = []
        """The parameters of the model that are in no parameter group."""
        self.has_bucket_views = False
        """Return True for a DistributedDataParallel whose gradients are views of its buckets."""
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
    """

    def __init__(self, params: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        self.params: Sequence[Tensor] = params
        if params:  # most that do not require a gradient never get one
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
        grads = {param: param.grad for param in params}
        views = {param: grad for param, grad in grads.items() if grad is not None and may_be_part(grad)}
        are_parts = parts_of_buffers(list(views.values()))
        parts = {param: grad for (param, grad), is_part in zip(views.items(), are_parts, strict=True) if is_part}
        if self._first is None:
            self._first = {param: Held.of(grad, copied=param in parts) for param, grad in grads.items()}
        for param in params:
            if param in parts:
                parts[param].zero_()
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
