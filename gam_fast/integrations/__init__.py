"""Adapters to frameworks that own the training loop.

These are ``SharpnessAwareTrainer`` (Hugging Face Transformers), ``SharpnessAwareCallback`` (Lightning) and
``register_timm`` (timm). A framework's package is imported only when its adapter is first accessed here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lightning import SharpnessAwareCallback as SharpnessAwareCallback
    from .timm import register_timm as register_timm
    from .transformers import SharpnessAwareTrainer as SharpnessAwareTrainer

_PARTS = {
    "SharpnessAwareCallback": ("lightning", "lightning"),
    "SharpnessAwareTrainer": ("transformers", "transformers accelerate"),
    "register_timm": ("timm", "timm"),
}
"""For each name, its module and the packages to install for it."""

__all__ = ["SharpnessAwareCallback", "SharpnessAwareTrainer", "register_timm"]


def __getattr__(name: str) -> Any:
    if name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, packages = _PARTS[name]
    try:
        return getattr(import_module(f".{module}", __name__), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"gam_fast.integrations.{name} needs {error.name}: pip install {packages}", name=error.name
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
