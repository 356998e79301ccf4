"""The eager backend, each primitive through ``torch.compile``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from gam_fast.backends import EagerBackend
from gam_fast.backends.base import Direction, Leaves

_numbers = itertools.count()


def _traced(name: str) -> Callable[..., Any]:
    """A primitive whose :class:`Leaves` are made within the trace, so that its scratch memory never leaves it.

    It has a code object of its own: the compiler limits how many variants it makes of one.
    """
    primitive = getattr(EagerBackend(), name)

    def run(leaves: tuple[Any, ...], *arguments: Any, **options: Any) -> Any:
        return primitive(Leaves(*leaves), *arguments, **options)

    code = run.__code__.replace(co_name=f"{name}_{next(_numbers)}")
    return FunctionType(code, run.__globals__, name, run.__defaults__, run.__closure__)


def _as_input(argument: Any) -> Any:
    """Norms and inner products as tensors: a number is a constant to the compiler, which would compile every value."""
    if isinstance(argument, float):
        return torch.tensor(argument, dtype=torch.float64)
    if isinstance(argument, Direction) and argument.products is not None:
        return replace(argument, products=torch.as_tensor(argument.products, dtype=torch.float64))
    return argument


class Compiled(EagerBackend):
    """The eager backend, each primitive through ``torch.compile``.

    Chunks, tensors and the parts of norms are unrolled: seconds for one tensor of one chunk, minutes and more for
    models. A new value of a hyper-parameter, such as a learning rate, compiles anew.
    """

    name = "compile"

    def __init__(self) -> None:
        for name in ("square_norm", "perturb", "inner_products", "restore", "direction", "sgd", "adam"):
            setattr(self, name, self._primitive(name))

    @staticmethod
    def _primitive(name: str) -> Callable[..., Any]:
        compiled = torch.compile(_traced(name), dynamic=False)

        def run(leaves: Leaves, *arguments: Any, **options: Any) -> Tensor | None:
            inputs = (leaves.params, leaves.group, leaves.backup, leaves.saved)
            result: Tensor | None = compiled(inputs, *map(_as_input, arguments), **options)
            leaves.saved |= name == "perturb"
            return result

        return run
