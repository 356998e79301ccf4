"""The end of a step whose passes stayed on each process: agreement, and the mean of the directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .backends.base import Direction, TensorList
from .distributed import Agreement, LocalSync
from .finite import FiniteWatch, listed
from .parameters import ParameterBlock, StepParameters, materialise


def agree(
    local: LocalSync, blocks: StepParameters, watch: FiniteWatch, recipe: str, change: float | None
) -> float | None:
    """With the other processes: all take the step or none does, with the same parameters.

    Returns the mean of ``change`` over the processes; ``None`` where there is none.

    Raises:
        RuntimeError: another process has left the step by an exception.
        NonFiniteGradientError, SkipStep: another has found a gradient not finite.
    """
    present = blocks.present()
    found = local.agree(present, nonfinite=not watch.is_finite(), value=change or 0.0)
    _check_all_there(found, recipe)
    if found.nonfinite:
        watch.refuse(f"a pass of {recipe} on rank {listed(found.nonfinite)}")
    unflagged = [i for i, anywhere in enumerate(found.present) if anywhere and not present[i]]
    if unflagged:
        blocks.activate(unflagged)
    return None if change is None else _mean(found)


def mean_of_all(local: LocalSync, blocks: StepParameters, value: float, recipe: str) -> float:
    """The mean of a number that is not negative over the processes, in the course of a step.

    Raises:
        RuntimeError: another process has left the step by an exception.
    """
    found = local.exchange(value, len(blocks.params))
    _check_all_there(found, recipe)
    return _mean(found)


def _mean(found: Agreement) -> float:
    return sum(found.values) / len(found.values)


def _check_all_there(found: Agreement, recipe: str) -> None:
    if found.failed:
        raise RuntimeError(
            f"this step of {recipe} was left by an exception on rank {listed(found.failed)}; it is undone on all ranks"
        )


def averaged(
    local: LocalSync,
    blocks: StepParameters,
    directions: Sequence[tuple[ParameterBlock, Direction]],
    gamma: list[float],
    limit: float | None,
) -> list[tuple[ParameterBlock, Direction]]:
    """The mean of the directions over the processes, of a norm of at most ``limit``."""
    ones = [[1.0] * len(gamma)]
    made = [(block, _own(block, materialise(block, direction))) for block, direction in directions]
    of = {param: x for block, xs in made for param, x in zip(block.owners, xs, strict=True)}
    local.average([of[param] for param in blocks.params if param in of])
    products = None if limit is None else blocks.inner_products([(block, [xs]) for block, xs in made], ones)
    return [(block, Direction([xs], ones, None, products, gamma, limit)) for block, xs in made]


def _own(block: ParameterBlock, tensors: TensorList) -> TensorList:
    """The tensors, to be written to: copies of those that are the gradients which the parameters keep."""
    return [
        x.clone(memory_format=torch.preserve_format) if x is param.grad else x
        for param, x in zip(block.owners, tensors, strict=True)
    ]
