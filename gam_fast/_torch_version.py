"""The oldest release of torch that the package supports."""

from __future__ import annotations

OLDEST = (2, 6)
"""The oldest release that the tests ran with. It loads checkpoints with ``weights_only=True`` by default."""


def require_torch() -> None:
    """Raise ``ImportError``, naming what to install, unless a new enough torch can be imported."""
    needed = ".".join(map(str, OLDEST))
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"gam_fast needs PyTorch {needed} or newer: pip install 'torch>={needed}'") from error
    check(torch.__version__)


def check(version: str) -> None:
    """Raise ``ImportError`` unless ``version`` is new enough.

    >>> check("2.13.0+cpu")
    """
    found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if found < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(
            f"gam_fast needs PyTorch {needed} or newer, found {version}: pip install -U 'torch>={needed}'"
        )
