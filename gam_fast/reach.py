"""Find the model that a step was not given: among the objects that the calling code has names for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from inspect import CO_OPTIMIZED
from types import FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

LIMIT = 1000
"""So many objects are looked at."""

DEPTH = 3
"""So far from a name: a model in a list in an attribute of ``self``."""


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
        return list(_contents(value))
    try:
        inside = object.__getattribute__(value, "__dict__")  # without what the object does when it is asked
    except AttributeError:
        return ()
    return list(inside.values()) if isinstance(inside, dict) else ()


def _contents(function: FunctionType) -> Iterator[Any]:
    """The variables that a closure has of the functions around it."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # nothing there yet
            yield cell.cell_contents
