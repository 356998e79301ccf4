"""Find the model of a copied optimizer or of one without ``model=``, and its parameters of other optimizers."""

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
"""Number of objects to search for a model that was not given."""

DEPTH = 3
"""Search depth from a name: 3 reaches a model in a list in an attribute of ``self``."""

RUNNING: dict[int, Sequence[Tensor]] = {}
"""The parameters of each step in progress: steps of several optimizers may interleave, also of several threads."""


@dataclass
class _Count:
    steps: int = 0


CLOSED = _Count()
"""Number of finished steps of all optimizers. Each may have left gradients in parameters of another."""


class ModelOfCopy:
    """Stands for the module of a copied or pickled optimizer, without being a copy of it.

    A deep copy refers to the copy of the module if the same call copied that first. A pickle holds only the name of the
    module's class; :meth:`find` looks for the module that came with the parameters.

    ``matters`` is true if steps without the module would silently go wrong: it has buffers, or synchronises processes.
    """

    def __init__(self, module: nn.Module | None, name: str, matters: bool) -> None:
        self.module = module
        self.name = name
        self.matters = matters

    @classmethod
    def of(cls, module: nn.Module | None, *, matters: bool) -> ModelOfCopy | None:
        """Make one for an optimizer with this ``model``. It matters if ``matters`` or if the module has buffers."""
        if module is None:
            return None
        return cls(module, type(module).__qualname__, matters or next(module.buffers(), None) is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelOfCopy:
        return ModelOfCopy(memo.get(id(self.module)), self.name, self.matters)

    def __reduce__(self) -> tuple[Callable[..., ModelOfCopy], tuple[None, str, bool]]:
        return ModelOfCopy, (None, self.name, self.matters)

    def find(self, params: Iterable[Tensor]) -> nn.Module | None:
        """Return the module that holds most of the parameters; prefer the right class name, then the smallest.

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
    """Return the modules that have one of ``params`` and that a running function can reach by name.

    No hook is registered for this, because a hook would make a compiled model recompile.

    >>> model = nn.Linear(2, 1)
    >>> modules_in_reach(list(model.parameters())) == [model]
    True
    """
    if sys.gettrace() is not None:  # a debugger may hold the snapshots that this function clears
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


def _names() -> Iterator[Any]:
    """Yield the local variables of all running functions, and the global ones of the nearest."""
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
        named.clear()  # the snapshot would keep all values alive while the function runs
    return found


def _parts(value: Any) -> Iterable[Any]:
    """Return the objects that ``value`` holds."""
    kind = type(value)
    if issubclass(kind, dict):
        return list(value.values())
    if issubclass(kind, list | tuple):
        return list(value)
    if kind is MethodType:
        return (value.__self__,)
    if kind is FunctionType:
        return [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # skips empty cells
    try:
        inside = object.__getattribute__(value, "__dict__")  # without running the object's own code
    except AttributeError:
        return ()
    return list(inside.values()) if isinstance(inside, dict) else ()


class Surroundings:
    """The rest of ``model``, as far as a step needs it; searched again if model or groups change."""

    def __init__(self) -> None:
        self.others: list[Tensor] = []
        """The parameters of the model that are in no parameter group."""
        self.has_bucket_views = False
        """True for a DistributedDataParallel whose gradients are views of its buckets."""
        self._model: nn.Module | None = None
        self._seen: tuple[int, ...] = ()
        self._tables: list[dict[str, Any]] = []  # dicts of parameters and submodules, by module

    def look(self, model: nn.Module | None, groups: Sequence[dict[str, Any]]) -> Surroundings:
        """Update this object and return it. Most steps only compare a few lengths."""
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
    """A recorded gradient: the tensor (or ``None``), its version, and a copy of its elements if needed."""

    grad: Tensor | None
    version: int = 0
    values: Tensor | None = None

    @staticmethod
    def of(grad: Tensor | None, *, copied: bool) -> Held:
        """Record ``grad``; with ``copied``, keep a copy of its elements."""
        if grad is None:
            return Held(None)
        return Held(grad, version(grad), grad.detach().clone() if copied else None)

    def give_back(self, param: Tensor) -> None:
        """Set ``param.grad`` back to the recorded gradient."""
        param.grad = self.grad
        if self.grad is not None and self.values is not None and version(self.grad) != self.version:
            self.grad.copy_(self.values)


class OtherGradients:
    """The gradients, during one step, of parameters that are not this optimizer's.

    In the pass that counts, backward adds to the gradient from before the step, as in plain torch. The gradients of the
    other passes are discarded.
    """

    def __init__(self, params: Sequence[Tensor], own: Sequence[Tensor]) -> None:
        self.params: Sequence[Tensor] = params
        if params:  # mostly parameters that do not require a gradient, and never get one
            self.params = [param for param in params if param.requires_grad or param.grad is not None]
        self._own = own
        self._before: dict[Tensor, Held] | None = None
        self._first: dict[Tensor, Held] | None = None

    def begin(self, *, keep_last: bool) -> None:
        """Prepare for a pass; with ``keep_last`` the last pass counts, otherwise the first."""
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
        """Record the first pass's gradients and clear all. Parts of other code's buffers are zeroed."""
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
        """Keep the gradients of the pass that counts, because the step was taken."""
        if self._first is not None:
            self._give_back(self._first)

    def close(self, *, undone: bool) -> None:
        """End the step; if it was undone, restore all gradients."""
        try:
            if undone and self._before is not None:
                self._give_back(self._before)
        finally:
            self._before = self._first = None  # copies of gradients, which the loop's variable would keep alive
            RUNNING.pop(id(self), None)
            CLOSED.steps += 1

    def _give_back(self, held: dict[Tensor, Held]) -> None:
        with torch.no_grad():
            for param in self._mine():
                held[param].give_back(param)

    def _mine(self) -> Sequence[Tensor]:
        """Return the parameters without those of other steps in progress, which handle the gradients themselves."""
        if len(RUNNING) > 1:
            taken = {id(param) for key, params in list(RUNNING.items()) if key != id(self) for param in params}
            self.params = [param for param in self.params if id(param) not in taken]
        return self.params
