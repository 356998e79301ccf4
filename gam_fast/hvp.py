"""Second derivatives of the loss: gradients that can be differentiated again, and Hessian-vector products.

The method is reverse mode over reverse mode: it keeps the graph of the gradient, and differentiates the gradient's
product with a constant vector. It works for any model whose operations have second derivatives, and needs no access to
the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from . import sums
from .backends import scalars
from .backends.base import Scalar
from .ownership import as_like, may_be_part
from .parameters import StepParameters
from .recipe import Recipe

Differentiable: TypeAlias = "Tensor | GradientEdge | None"
"""A differentiable gradient: the tensor, its edge in the graph, or ``None`` if the loss does not depend on it."""

_CHECKPOINT = (
    r"heckpoint.*incompatible with \.grad|heckpointing is not compatible with \.grad|CheckpointFunctionBackward"
)
HINTS = {
    r"derivative for .*(scaled_dot_product|flash|efficient_attention)": "its fused attention has none: run the model's "
    "forward under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    r"derivative for .*(cudnn|miopen)_rnn": "the fused recurrent layers have none: run the model's forward under "
    "torch.backends.cudnn.flags(enabled=False)",
    r"does not currently support double backward|non-empty donated buffers": "a compiled model has none: use the model "
    "given to torch.compile",
    _CHECKPOINT: "call torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    r"once_differentiable|autograd::Error": "a torch.autograd.Function is marked @once_differentiable: its backward "
    "has to be written in operations that can be differentiated",
}
"""Maps a pattern of torch's message to the part of the model without a second derivative, and a remedy."""

CUTS = ("CheckpointFunctionBackward", "torch::autograd::Error")
"""Nodes of a graph that torch silently treats as constant."""

CUSTOM = (
    "the backward of the torch.autograd.Function {name} does not keep its graph: it has to be written in operations "
    "that can be differentiated, on what ctx.save_for_backward kept"
)

HOW_TO_GIVE_A_LOSS = "return it from the closure without calling backward(), or call turn.backward(loss) in the loop"


class SecondDerivativeError(RuntimeError):
    """The loss cannot be differentiated twice; the message names a remedy.

    >>> import gam_fast
    >>> x = torch.nn.Parameter(torch.ones(1, 1, 2, 2))
    >>> optimizer = gam_fast.ExactGAM([x], torch.optim.SGD, lr=0.1)
    >>> optimizer.step(lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x).sum())
    Traceback (most recent call last):
    gam_fast.hvp.SecondDerivativeError: the loss cannot be differentiated twice: its fused attention has none: ...
    """

    def __init__(self, hint: str, found: object) -> None:
        super().__init__(
            f"the loss cannot be differentiated twice: {hint}. (GAM and zeroth-order flatness need gradients only.) "
            f"Found: {found}"
        )


def check_loss(loss: Tensor, method: str) -> None:
    """Refuse a loss that is not a tensor of one element, or does not require grad.

    Raises:
        TypeError, RuntimeError: it is such a loss.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(f"{method} needs the loss, a tensor of one element, got {given}: {HOW_TO_GIVE_A_LOSS}")
    if not loss.requires_grad:
        raise RuntimeError(
            f"the loss given to {method} does not depend on a parameter that requires a gradient: it must not be "
            "detached, nor computed under torch.no_grad()"
        )


def gradient(losses: Sequence[Tensor], params: Sequence[Tensor], *, twice: bool) -> list[Tensor | None]:
    r"""Return :math:`∇ \sum` of scalar losses, by parameter; ``None`` if no loss depends on it.

    With ``twice`` the gradients can be differentiated again, and the graph of the losses is kept.

    Raises:
        SecondDerivativeError: an operation does not allow ``twice``.

    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> gradient([(weight**3).sum()], [weight], twice=False)
    [tensor([ 3., 12.])]
    """
    with _explained(), ExitStack() as watched:
        custom = _refuse_cuts(losses)
        for node in custom if twice else ():
            watched.callback(node.register_hook(partial(_check_custom, type(node).__name__)).remove)
        grads = torch.autograd.grad(list(losses), list(params), create_graph=twice, allow_unused=True)
        _refuse_cuts(grads)
    return list(grads)


def _check_custom(name: str, grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
    """Check that a custom backward kept the graph: being linear, its output must depend on its input."""
    given = [grad for grad in grad_inputs if grad is not None]
    differentiable = any(grad is not None and grad.requires_grad for grad in grad_outputs)
    if given and differentiable and not any(grad.requires_grad for grad in given):
        raise SecondDerivativeError(CUSTOM.format(name=name.removesuffix("Backward")), name)


def scaled(tensors: Sequence[Tensor], factor: float | Tensor) -> list[Tensor]:
    """Return ``factor · tensors``, computed in fp32 (fp64 for float64) and rounded once; the factor may be 0-dim.

    All tensors have one dtype. On an accelerator torch would first round a 0-dim factor to that dtype, and 1/‖g‖ easily
    overflows in half precision.

    >>> scaled([torch.tensor([2.0**-14], dtype=torch.float16)], torch.tensor(2.0**17, dtype=torch.float64))
    [tensor([8.], dtype=torch.float16)]
    """
    if not isinstance(factor, Tensor):
        return list(torch._foreach_mul(list(tensors), factor))
    dtype = tensors[0].dtype
    working = torch.float32 if dtype.itemsize == 2 else dtype
    products = torch._foreach_mul([tensor.to(working) for tensor in tensors], factor.to(working))
    return [value.to(dtype) for value in products]


def edges(grads: Sequence[Tensor | None]) -> list[Differentiable]:
    """Return the edges of gradients in the graph, for :func:`product`: they hold the graph, not the gradients.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> g = gradient([(weight**3).sum()], [weight], twice=True)
    >>> product(edges(g), [weight], [torch.ones(2)])
    [tensor([6., 6.])]
    """
    return [None if grad is None or not grad.requires_grad else get_gradient_edge(grad) for grad in grads]


def product(grads: Sequence[Differentiable], params: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor | None]:
    r"""Return :math:`H v`, the derivative of :math:`⟨g, v⟩`, from the ``grads`` of :func:`gradient`; free the graph.

    ``None`` means zero. ``vector`` has one tensor per gradient, of its shape; it is ignored where the gradient is
    ``None``.

    Raises:
        SecondDerivativeError: an operation without a second derivative.

    >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> g = gradient([(weight**3).sum()], [weight], twice=True)
    >>> product(g, [weight], [torch.ones(2)])
    [tensor([ 6., 12.])]
    """
    pairs = [
        (g, v)
        for g, v in zip(grads, vector, strict=True)
        if g is not None and (not isinstance(g, Tensor) or g.requires_grad)
    ]
    if not pairs:  # the loss is linear in the parameters
        return [None] * len(params)
    outputs, weights = zip(*pairs, strict=True)
    with _explained():
        return list(torch.autograd.grad(outputs, list(params), weights, allow_unused=True))


def _refuse_cuts(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Search the graph for nodes that would silently make a second derivative wrong; takes 1 µs per node.

    Return the nodes of custom functions, which may do so as well.
    """
    seen = set()
    custom = []
    stack = [tensor.grad_fn for tensor in tensors if tensor is not None]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        if name in CUTS:
            raise SecondDerivativeError(next(hint for pattern, hint in HINTS.items() if re.search(pattern, name)), name)
        if issubclass(type(node), torch.autograd.function.BackwardCFunction):
            custom.append(node)
        stack += [following for following, _ in node.next_functions]
    return custom


@contextmanager
def _explained() -> Iterator[None]:
    """Add a remedy to torch's errors about operations without a second derivative."""
    try:
        yield
    except SecondDerivativeError:
        raise
    except RuntimeError as error:
        if type(error).__name__ == "CheckpointError":  # a checkpoint's recomputation differs
            raise
        hint = next((hint for pattern, hint in HINTS.items() if re.search(pattern, str(error))), None)
        missing = re.search(r"derivative for .* is not implemented|no autograd formula|not differentiable", str(error))
        if hint is None and missing is None:
            raise
        raise SecondDerivativeError(hint or "an operation of the model has no second derivative", error) from error


# Passes of a second-order recipe: the engine differentiates the loss, and then its gradient.


def differentiate(recipe: Recipe, blocks: StepParameters, losses: list[Tensor], index: int) -> list[Tensor | None]:
    """Put the gradient of the losses into ``param.grad``. Return it as differentiable gradients of all parameters.

    Raises:
        RuntimeError: there is no loss, backward was called on it, or no parameter requires a gradient.
    """
    found = [param.grad for param in blocks.params if param.grad is not None]
    if found or not losses:
        wrong = "backward() was called in it" if found else "it ended without a loss"
        if any(map(may_be_part, found)):
            wrong = "a gradient is part of a buffer, which the engine does not fill: set param.grad = None"
        raise RuntimeError(
            f"pass {recipe.passes_before[index]} of {recipe.name}: {wrong}. {recipe.name} differentiates the loss "
            f"itself, twice: {HOW_TO_GIVE_A_LOSS}"
        )
    params = [param for param in blocks.params if param.requires_grad]
    if not params:
        raise RuntimeError(f"no parameter of this {recipe.name} requires a gradient: there is nothing to optimize")
    grads = dict(zip(params, gradient(losses, params, twice=index + 1 in recipe.products), strict=True))
    for param, grad in grads.items():
        param.grad = None if grad is None else as_like(grad.detach(), param)
    return [grads.get(param) for param in blocks.params]


def multiply(blocks: StepParameters, index: int, graph: list[Tensor | None], total: Scalar, *, keep: bool) -> None:
    """Put the Hessian times the normalised gradient of vector ``index`` into ``param.grad``.

    The gradient is normalised before the product, so that a half-precision backward neither overflows nor underflows at
    any scale of the loss. ``total`` is the squared length. ``graph``, the differentiable gradient, is used up. Without
    ``keep`` the vector is dropped first.
    """
    units: dict[Tensor, Tensor] = {}
    for block in blocks.all:
        scale = scalars.steps([1.0 if block.perturbed else 0.0], sums.on(total, block.params[0].device))[0]
        units.update(zip(block.owners, scaled(list(block.grads[index]), scale), strict=True))
    pairs = [(param, grad) for param, grad in zip(blocks.params, graph, strict=True) if grad is not None]
    params = [param for param, _ in pairs]
    ends = edges([grad for _, grad in pairs])
    pairs.clear()
    graph.clear()
    if not keep:  # frees its memory: only the graph's edges are held
        blocks.drop(index)
    products = product(ends, params, [units[param] for param in params])
    ends.clear()
    units.clear()
    for block in blocks.all if keep else ():
        block.grads[index] = []  # one reference less, so that the gradients can be taken over
        block.grads[index] = block.backend.bookkeeping.take_gradients(block.params, keep=True)
    for param, value in zip(params, products, strict=True):
        param.grad = torch.zeros_like(param) if value is None else as_like(value, param)
