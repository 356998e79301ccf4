"""The eager backend with each primitive through ``torch.compile``, and GAM on this backend."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import gam_fast
from gam_fast.backends import EagerBackend
from gam_fast.backends.base import Block, Direction

MOST_COMPILED = 16
"""Most parameters for the compiled peer: on two cores, this many small ones compile for two minutes."""

MOST_COMPILED_ELEMENTS = 1 << 22
"""Most elements: 3.7 million, in six parameters, compile for more than two minutes. Both are unrolled."""

_numbers = itertools.count()


def _traced(name: str) -> Callable[..., Any]:
    """Return a primitive that makes its :class:`Block` within the trace, so that scratch memory never leaves it.

    Each primitive has its own code object, because the compiler limits the number of variants per code object.
    """
    primitive = getattr(EagerBackend(), name)

    def run(leaves: tuple[Any, ...], *arguments: Any, **options: Any) -> Any:
        return primitive(Block(*leaves), *arguments, **options)

    code = run.__code__.replace(co_name=f"{name}_{next(_numbers)}")
    return FunctionType(code, run.__globals__, name, run.__defaults__, run.__closure__)


def _as_input(argument: Any) -> Any:
    """Convert norms and products to tensors: the compiler treats a number as a constant and compiles every value."""
    if isinstance(argument, float):
        return torch.tensor(argument, dtype=torch.float64)
    if isinstance(argument, Direction) and argument.products is not None:
        return replace(argument, products=torch.as_tensor(argument.products, dtype=torch.float64))
    return argument


class Compiled(EagerBackend):
    """The eager backend, each primitive through ``torch.compile``.

    Chunks, tensors and the parts of norms are unrolled. Compilation takes seconds for one tensor of one chunk, and
    minutes or more for models. A new value of a hyper-parameter, such as a learning rate, compiles again.
    """

    name = "compile"

    def __init__(self) -> None:
        for name in ("square_norm", "perturb", "inner_products", "restore", "direction", "update"):
            setattr(self, name, self._primitive(name))

    @staticmethod
    def _primitive(name: str) -> Callable[..., Any]:
        compiled = torch.compile(_traced(name), dynamic=False)

        def run(leaves: Block, *arguments: Any, **options: Any) -> Tensor | None:
            inputs = (leaves.params, leaves.group, leaves.backup, leaves.saved)
            result: Tensor | None = compiled(inputs, *map(_as_input, arguments), **options)
            leaves.saved |= name == "perturb"
            return result

        return run


def missing_compiler() -> str | None:
    """Return why there is no C++ compiler, or None."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and {compiler} is not found: install it, or name another by CXX="
    return None


def compiled_gam(
    model: nn.Module, params: Any, base: type[Optimizer], base_options: dict[str, Any], **hyper: Any
) -> gam_fast.GAM:
    """Return GAM on the compiled eager backend.

    Raises:
        ValueError: a base other than SGD (Adam's step count is a constant to the compiler, so each step would compile
            again); more than :data:`MOST_COMPILED` parameters or :data:`MOST_COMPILED_ELEMENTS` elements.
    """
    backend = Compiled()

    class CompiledGAM(gam_fast.GAM):
        def _select(self, device: torch.device) -> Compiled:
            return backend

    if base is not SGD:
        raise ValueError(f"compiled eager GAM needs SGD as base, got {base.__name__}, which it would compile each step")
    optimizer = CompiledGAM(params, base, model=model, **base_options, **hyper)
    sizes = [param.numel() for group in optimizer.param_groups for param in group["params"]]
    if len(sizes) > MOST_COMPILED or sum(sizes) > MOST_COMPILED_ELEMENTS:
        raise ValueError(
            f"compiled eager GAM takes at most {MOST_COMPILED} parameters of {MOST_COMPILED_ELEMENTS} elements "
            f"together, got {len(sizes)} of {sum(sizes)}: choose a smaller model, or leave this peer out"
        )
    return optimizer
