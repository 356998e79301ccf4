"""Check whether Triton works in this process and on a device, before a step depends on it."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

from ..kernels.table import BLOCK_OF_TOTALS
from .launches import guard, start

OLDEST = (3, 6)
OLDEST_ON_ROCM = (3, 7)
"""The first releases of Triton that round roots and quotients as IEEE 754 says, also of numbers below 2⁻¹²⁶."""


def interprets() -> bool:
    """Return whether the environment asks for Triton's interpreter, which works on CPU tensors only."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def kernels() -> ModuleType:
    """Import the kernels, and Triton with them."""
    for name in ("formulas", "moves", "sums", "updates"):
        import_module(f"gam_fast.kernels.{name}")
    return import_module("gam_fast.kernels")


_reasons: dict[torch.device, str | None] = {}  # by device, once probed


def why_unusable(device: torch.device) -> str | None:
    """Return why Triton cannot be used on a device, or None. Probe it by a small sum, once per process."""
    if device not in _reasons:
        try:
            reason = _try(device)
        except torch.OutOfMemoryError as error:  # may be temporary
            return f"Triton could not be tried: {error}"
        except Exception as error:  # Triton fails in many ways, for example without a C compiler
            first = f"{error}".partition("\n")[0]
            reason = f"Triton does not work there: {type(error).__name__}: {first}"
        _reasons[device] = reason
    return _reasons[device]


def _try(device: torch.device) -> str | None:
    import triton

    version: str = triton.__version__
    oldest = OLDEST_ON_ROCM if torch.version.hip else OLDEST
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        return f"Triton {version} is too old: {'.'.join(map(str, oldest))} or newer is needed"
    totals = kernels().sums.totals
    kinds = {type(kernel).__name__ == "InterpretedFunction" for kernel in (totals, triton.language.sum)}
    if kinds != {interprets()}:
        return "TRITON_INTERPRET was changed after Triton had been imported: set it before the process starts"
    return None if _adds_up(device) else f"Triton {version} computes a wrong sum there"


def _adds_up(device: torch.device) -> bool:
    parts = torch.ones(3, 1, dtype=torch.float64, device=device)
    found = torch.zeros(1, 1, dtype=torch.float64, device=device)
    starts = torch.tensor([0, 3], device=device)
    with guard(device):
        start(kernels().sums.totals, 1, parts, starts, found, SUMS=1, BLOCK=BLOCK_OF_TOTALS, warps=4)
    return torch.equal(found, parts.sum().view(1, 1))
