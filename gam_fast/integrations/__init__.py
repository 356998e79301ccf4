"""What joins the optimizers to frameworks that own the training loop.

``SharpnessAwareTrainer`` (Hugging Face Transformers), ``SharpnessAwareCallback`` (Lightning) and ``register_timm``
(timm). The package of a
framework is imported when its name is first asked for here, and by nothing else in gam_fast.
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
"""The module of each name, and what has to be installed for it."""

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
