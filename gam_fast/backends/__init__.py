"""Which backends there are, which of them run here, and which one a device gets."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .base import Backend
from .eager import EagerBackend

__all__ = ["Backend", "EagerBackend", "Status", "available", "select"]

ENVIRONMENT_VARIABLE = "GAM_FAST_BACKEND"
"""Overrides the ``backend=`` argument of every optimizer of the process."""

_PREFERENCE = ("native", "triton", "eager")
_BACKENDS: dict[str, Backend] = {"eager": EagerBackend()}
_MISSING = {
    "native": "this version of gam_fast has no compiled core yet",
    "triton": "this version of gam_fast has no Triton kernels yet",
}


@dataclass(frozen=True)
class Status:
    """Whether a backend can be used in this process, and what it does or why it cannot."""

    available: bool
    reason: str


def available() -> dict[str, Status]:
    """All backends in order of preference.

    >>> available()["eager"]
    Status(available=True, reason='torch._foreach_* operations, on any device')
    """
    statuses = {name: Status(False, reason) for name, reason in _MISSING.items()}
    statuses["eager"] = Status(True, "torch._foreach_* operations, on any device")
    return {name: statuses[name] for name in _PREFERENCE}


def select(name: str, device: torch.device) -> Backend:
    """The backend called ``name`` for tensors on ``device``; ``"auto"`` takes the first available one.

    The environment variable ``GAM_FAST_BACKEND``, when set, is used in place of ``name``.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that is not available here, with the reason.

    >>> select("auto", torch.device("cpu")).name
    'eager'
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE) or name
    source = f"{ENVIRONMENT_VARIABLE}={wanted}" if os.environ.get(ENVIRONMENT_VARIABLE) else f"backend={wanted!r}"
    statuses = available()
    if wanted == "auto":
        wanted = next(candidate for candidate in _PREFERENCE if statuses[candidate].available)
    if wanted not in statuses:
        raise ValueError(f"unknown {source}: choose one of {', '.join(('auto', *_PREFERENCE))}")
    if not statuses[wanted].available:
        raise RuntimeError(f"{source} is not available for {device}: {statuses[wanted].reason}; use 'auto' or 'eager'")
    return _BACKENDS[wanted]
