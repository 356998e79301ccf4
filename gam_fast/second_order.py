"""The passes of a recipe of second order: the loss is differentiated by the engine, and its gradient once more."""

from __future__ import annotations

import torch
from torch import Tensor

from . import hvp, scalars
from .backends.base import Scalar
from .backends.scalars import steps
from .ownership import as_like, may_be_part
from .parameters import StepParameters
from .recipes import Recipe


def differentiate(recipe: Recipe, blocks: StepParameters, losses: list[Tensor], index: int) -> list[Tensor | None]:
    """The gradient of the losses handed over, into ``param.grad``; as it can be differentiated again, for all.

    Raises:
        RuntimeError: there is no loss, backward was called on it, or no parameter requires a gradient.
    """
    found = [param.grad for param in blocks.params if param.grad is not None]
    if found or not losses:
        wrong = "backward() was called in it" if found else "it ended without a loss"
        if any(map(may_be_part, found)):
            wrong = "a gradient is part of a buffer, in which nothing arrives: set param.grad = None"
        raise RuntimeError(
            f"pass {recipe.pass_of(index)} of {recipe.name}: {wrong}. {recipe.name} differentiates the loss itself, "
            f"twice: {hvp.HOW_TO_GIVE_A_LOSS}"
        )
    params = [param for param in blocks.params if param.requires_grad]
    if not params:
        raise RuntimeError(f"no parameter of this {recipe.name} requires a gradient: there is nothing to optimize")
    grads = dict(zip(params, hvp.gradient(losses, params, twice=recipe.has_product(index)), strict=True))
    for param, grad in grads.items():
        param.grad = None if grad is None else as_like(grad.detach(), param)
    return [grads.get(param) for param in blocks.params]


def multiply(blocks: StepParameters, index: int, graph: list[Tensor | None], total: Scalar, *, keep: bool) -> None:
    """The Hessian times the gradient of vector ``index``, scaled to length 1, into ``param.grad``.

    Scaled before and not after, so that a half-precision backward neither overflows nor underflows, whatever the scale
    of the loss. ``total`` is the square of the length; ``graph``, the gradient as it can be differentiated, is used up.
    Without ``keep`` the vector is dropped first.
    """
    units: dict[Tensor, Tensor] = {}
    for block in blocks.all:
        scale = steps([1.0], scalars.on(total, block.leaves.params[0].device))[0]
        units.update(zip(block.owners, hvp.scaled(list(block.grads[index]), scale), strict=True))
    pairs = [(param, grad) for param, grad in zip(blocks.params, graph, strict=True) if grad is not None]
    params = [param for param, _ in pairs]
    edges = hvp.edges([grad for _, grad in pairs])
    pairs.clear()
    graph.clear()
    if not keep:  # its memory is free from here on: of the graph, only the edges are held
        blocks.drop(index)
    products = hvp.product(edges, params, [units[param] for param in params])
    edges.clear()
    units.clear()
    for block in blocks.all if keep else ():
        block.grads[index] = []  # a reference less, so that they can be taken over
        block.grads[index] = block.backend.bookkeeping.take_gradients(block.leaves.params, keep=True)
    for param, value in zip(params, products, strict=True):
        param.grad = torch.zeros_like(param) if value is None else as_like(value, param)
