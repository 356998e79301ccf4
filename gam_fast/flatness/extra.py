"""Optional packages: imported when they are needed, with an error that says how to install them."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

_TORCH = torch.__version__.partition("+")[0]
INSTALL = (
    f"in a checkout of gam_fast, pip install --no-build-isolation '.[flatness]' torch=={_TORCH} (without torch there, "
    "a dependency may replace the one that you have)"
)


def require(name: str, purpose: str) -> ModuleType:
    """Import and return the module ``name``.

    Raises:
        ImportError: it or one of its dependencies is not installed; the message says what to install.

    >>> require("math", "arithmetic").pi
    3.141592653589793
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dependencies use deprecated functions of torch
            return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {name} ({error}): {INSTALL}") from error


@contextmanager
def counting(show: bool, description: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Yield a function to call once per evaluation; with ``show`` it advances a progress bar.

    >>> with counting(False, "products") as tick:
    ...     tick()
    """
    if not show:
        yield lambda: None
        return
    tqdm = require("tqdm", "a progress bar").tqdm
    with tqdm(total=total, desc=description, leave=False) as bar:
        yield lambda: bar.update() and None
