"""The backends: list those that run here, and select one for a device."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch

from .base import Backend
from .eager import EagerBackend

__all__ = ["Backend", "EagerBackend", "Status", "available", "select"]

ENVIRONMENT_VARIABLE = "GAM_FAST_BACKEND"
"""Overrides the ``backend=`` argument of every optimizer of the process."""

_PREFERENCE = ("native", "triton", "eager")


@dataclass(frozen=True)
class Status:
    """Availability of a backend in this process; ``reason`` describes it or says why it cannot be used."""

    available: bool
    reason: str


@cache
def _classes() -> dict[str, type[Backend] | str]:
    """Return for each backend its class, or the reason why it is missing."""
    found: dict[str, type[Backend] | str] = {}
    for name, class_name in (("native", "NativeBackend"), ("triton", "TritonBackend")):
        try:
            found[name] = getattr(import_module(f"{__name__}.{name}"), class_name)
        except ImportError as error:
            found[name] = str(error)
    return {**found, "eager": EagerBackend}


@cache
def _warn_of_misfit() -> None:
    """Warn, once per process, that the installed compiled core does not fit this torch."""
    try:
        from . import native  # noqa: F401
    except ImportError as error:
        if error.path:
            warnings.warn(
                f"gam_fast runs without its compiled core, several times slower on a CPU: {error}. backend='eager', or "
                f"{ENVIRONMENT_VARIABLE}=eager, does without it and this warning",
                stacklevel=6,
            )


def available() -> dict[str, Status]:
    """Return all backends in order of preference, each with a description or the reason why it cannot be used.

    >>> available()["eager"]
    Status(available=True, reason='torch._foreach_* operations, on any device')
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = [torch.device("cpu"), *([accelerator] if accelerator else [])]
    statuses = {}
    for name in _PREFERENCE:
        found = _classes()[name]
        refusals = [found] if isinstance(found, str) else [found.refusal(device) for device in devices]
        usable = not isinstance(found, str) and None in refusals
        statuses[name] = Status(True, found.describe()) if usable else Status(False, f"{refusals[-1]}")  # type: ignore[union-attr]
    return statuses


def select(name: str, device: torch.device) -> Backend:
    """Return a backend called ``name`` for tensors on ``device``; ``"auto"`` takes the first available one.

    The order is native, triton, eager. Triton is imported only when its turn comes: for an NVIDIA or AMD GPU that the
    compiled core has no code for.

    ``"auto"`` warns, once per process, if the compiled core is installed but does not fit this torch.

    If the environment variable ``GAM_FAST_BACKEND`` is set, it replaces ``name``. Each optimizer has its own backend
    for each device, so a backend may keep plans between steps.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that is not available here or for this device, with the reason.

    >>> select("eager", torch.device("cpu")).name
    'eager'
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE) or name
    source = f"{ENVIRONMENT_VARIABLE}={wanted}" if os.environ.get(ENVIRONMENT_VARIABLE) else f"backend={wanted!r}"
    if wanted not in ("auto", *_PREFERENCE):
        raise ValueError(f"unknown {source}: choose one of {', '.join(('auto', *_PREFERENCE))}")
    classes = _classes()
    for candidate in _PREFERENCE if wanted == "auto" else (wanted,):
        if wanted == "auto" and candidate == "triton" and device.type == "cpu":
            continue  # Triton's interpreter is for tests
        found = classes[candidate]
        if wanted == "auto" and candidate == "native" and isinstance(found, str) and device.type in ("cpu", "cuda"):
            _warn_of_misfit()
        reason = found if isinstance(found, str) else found.refusal(device)
        if not isinstance(found, str) and reason is None:
            return found()
    raise RuntimeError(f"{source} is not available for {device}: {reason}; use 'auto' or 'eager'")
