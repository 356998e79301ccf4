"""Alternatives to gam_fast: plain loops, pytorch-optimizer, ``torch.compile``; timed only if their results agree.

- *plain* SAM and GAM are the formulas as one writes them by hand: loops over parameters and operations of torch, in
  place where that is natural. Nothing is fused or batched, dropout draws anew in each pass, and the running statistics
  of BatchNorm move in each.
- *foreach* GAM is the plain loop with torch's operations on lists of tensors, as in torch's own optimizers.
- *pytorch-optimizer*'s SAM and GSAM compute the same formulas with the same ξ = 1e-12. Their norms are rounded to
  fp32 for any parameters, so in fp64 a trajectory agrees to about 1e-8, and must agree to 1e-6. Their GSAM takes one
  radius from a scheduler, which is constant here, and freezes the running statistics in the second pass; their SAM
  does not.
- *compiled* is gam_fast on the eager backend with each primitive through ``torch.compile`` (:mod:`bench.compiled`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

import gam_fast
from gam_fast.backends.scalars import XI

from .adapters import PytorchOptimizerGSAM, PytorchOptimizerSAM, missing_package
from .compiled import compiled_gam, missing_compiler


class Stepper(Protocol):
    """An optimizer whose closure computes the loss, calls backward and returns the loss; it is called once per pass."""

    def step(self, closure: Callable[[], Tensor]) -> Any:
        """Clear gradients and take one step; return the loss before any perturbation."""
        ...


class Plain(Optimizer):
    """Base class of plain loops: the base optimizer, and gradients as lists."""

    def __init__(self, params: Any, base: type[Optimizer], base_options: dict[str, Any], **hyper: Any) -> None:
        super().__init__(params, hyper)
        self.base = base(self.param_groups, **base_options)
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    def evaluate(self, closure: Callable[[], Tensor]) -> Tensor:
        """Return the loss, after computing fresh gradients."""
        self.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss: Tensor = closure()
        return loss

    def participants(self) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Return the parameters that have a gradient, and the group of each."""
        pairs = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        return [p for p, _ in pairs], [group for _, group in pairs]


def gradients(params: list[Tensor]) -> list[Tensor]:
    """Return the gradients that exist."""
    return [p.grad for p in params if p.grad is not None]


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm of all tensors together, from the norm of each."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))
    return norm


def foreach_norm(tensors: list[Tensor]) -> Tensor:
    """Return the norm of all tensors together, with one operation of torch on their list."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
    return norm


class PlainSAM(Plain):
    """SAM as a loop over parameters."""

    def __init__(self, params: Any, base: type[Optimizer], base_options: dict[str, Any], *, rho: float = 0.05) -> None:
        super().__init__(params, base, base_options, rho=rho)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Perturb along the gradient, and step with the gradient there; return the first loss."""
        loss = self.evaluate(closure)
        params, groups = self.participants()
        theta = [p.clone() for p in params]
        g0 = gradients(params)
        scale = 1.0 / (total_norm(g0) + XI)
        for p, g, group in zip(params, g0, groups, strict=True):
            p.addcmul_(g, scale, value=group["rho"])

        self.evaluate(closure)
        for p, start in zip(params, theta, strict=True):
            p.copy_(start)
        self.base.step()
        return loss


class PlainGAM(Plain):
    """GAM, Algorithm 2, as a loop over parameters."""

    def __init__(
        self,
        params: Any,
        base: type[Optimizer],
        base_options: dict[str, Any],
        *,
        rho: float = 0.2,
        rho_prime: float = 0.02,
        alpha: float = 0.6,
        beta: float = 0.5,
        gamma: float = 0.03,
    ) -> None:
        hyper = {"rho": rho, "rho_prime": rho_prime, "alpha": alpha, "beta": beta, "gamma": gamma}
        super().__init__(params, base, base_options, **hyper)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Take the four gradients of GAM, and step along its direction; return the first loss."""
        loss = self.evaluate(closure)
        params, groups = self.participants()
        theta = [p.clone() for p in params]
        g0 = gradients(params)
        scale = 1.0 / (total_norm(g0) + XI)
        for p, g, group in zip(params, g0, groups, strict=True):
            p.addcmul_(g, scale, value=group["rho_prime"])

        self.evaluate(closure)
        g1 = gradients(params)
        h0 = [b - a for a, b in zip(g0, g1, strict=True)]
        scale = 1.0 / (total_norm(h0) + XI)
        for p, start, h, group in zip(params, theta, h0, groups, strict=True):
            p.copy_(start).addcmul_(h, scale, value=group["rho"])
        del h0, h

        self.evaluate(closure)
        g2 = gradients(params)
        scale = 1.0 / (total_norm(g2) + XI)
        for p, g, group in zip(params, g2, groups, strict=True):
            p.addcmul_(g, scale, value=group["rho_prime"])

        self.evaluate(closure)
        g3 = gradients(params)
        inner, square = [], []
        for a, b, c, d, group in zip(g0, g1, g2, g3, groups, strict=True):
            m = a.mul_(group["beta"]).add_(c, alpha=1.0 - group["beta"])
            u = d.mul_(1.0 - group["alpha"]).add_(b, alpha=group["alpha"])
            inner.append(torch.dot(m.flatten(), u.flatten()))
            square.append(torch.dot(u.flatten(), u.flatten()))
        kappa = torch.stack(inner).sum() / torch.stack(square).sum()
        for p, start, m, u, group in zip(params, theta, g0, g3, groups, strict=True):
            p.copy_(start)
            m.addcmul_(u, kappa, value=-1.0)
            u.sub_(m, alpha=group["gamma"])  # u is p.grad
        self.base.step()
        return loss


def nothing_missing() -> None:
    """Return None: the peer needs only torch."""


@dataclass(frozen=True)
class Peer:
    """An alternative implementation of one method of gam_fast.

    Attributes:
        name: its name in tables.
        method: the corresponding class of gam_fast.
        build: ``build(model, params, base, base_options, **hyper)``, with every hyper-parameter of the method.
        missing: returns why it cannot run here, or ``None``.
        tolerance: the largest :func:`disagreement` that counts as rounding.
    """

    name: str
    method: str
    build: Callable[..., Stepper]
    missing: Callable[[], str | None] = nothing_missing
    tolerance: float = 1e-10

    def make(
        self,
        model: nn.Module,
        base: type[Optimizer],
        base_options: dict[str, Any],
        method_options: dict[str, Any],
        params: Iterable[Any] | None = None,
    ) -> Stepper:
        """Return the optimizer; missing hyper-parameters have the defaults of gam_fast's method.

        Args:
            model: the module being trained.
            base: class of the base optimizer.
            base_options: its arguments.
            method_options: hyper-parameters, by the names of gam_fast.
            params: parameters or groups, in which arguments of the base may be set; default: all parameters of the
                model.
        """
        hyper = {**getattr(gam_fast, self.method).recipe.defaults, **method_options}
        return self.build(model, model.parameters() if params is None else params, base, base_options, **hyper)


class ForeachGAM(PlainGAM):
    """GAM, Algorithm 2, with operations of torch on lists of tensors."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Take the four gradients of GAM, and step along its direction; return the first loss."""
        loss = self.evaluate(closure)
        params, groups = self.participants()
        theta = [p.clone() for p in params]
        g0 = gradients(params)
        self.perturb(params, g0, groups, "rho_prime")

        self.evaluate(closure)
        g1 = gradients(params)
        h0 = list(torch._foreach_sub(g1, g0))
        torch._foreach_copy_(params, theta)
        self.perturb(params, h0, groups, "rho")
        del h0

        self.evaluate(closure)
        g2 = gradients(params)
        self.perturb(params, g2, groups, "rho_prime")

        self.evaluate(closure)
        g3 = gradients(params)
        m, u = g0, g3
        torch._foreach_mul_(m, [group["beta"] for group in groups])
        torch._foreach_add_(m, torch._foreach_mul(g2, [1.0 - group["beta"] for group in groups]))
        torch._foreach_mul_(u, [1.0 - group["alpha"] for group in groups])
        torch._foreach_add_(u, torch._foreach_mul(g1, [group["alpha"] for group in groups]))
        square = foreach_norm(u).square()
        inner = torch.stack([product.sum() for product in torch._foreach_mul(m, u)]).sum()
        torch._foreach_copy_(params, theta)
        torch._foreach_sub_(m, torch._foreach_mul(u, inner / square))
        torch._foreach_add_(u, torch._foreach_mul(m, [-group["gamma"] for group in groups]))  # u is p.grad
        self.base.step()
        return loss

    def perturb(self, params: list[Tensor], v: list[Tensor], groups: list[dict[str, Any]], radius: str) -> None:
        """Move the parameters by their radius along v."""
        move = torch._foreach_mul(v, [group[radius] for group in groups])
        torch._foreach_mul_(move, 1.0 / (foreach_norm(v) + XI))
        torch._foreach_add_(params, move)


def without_model(optimizer: Callable[..., Stepper]) -> Callable[..., Stepper]:
    """Return :attr:`Peer.build` for an optimizer that needs only the parameters."""
    return lambda model, *arguments, **hyper: optimizer(*arguments, **hyper)


PEERS: dict[str, Peer] = {
    "plain-gam": Peer("plain GAM", "GAM", without_model(PlainGAM)),
    "foreach-gam": Peer("foreach GAM", "GAM", without_model(ForeachGAM)),
    "plain-sam": Peer("plain SAM", "SAM", without_model(PlainSAM)),
    "pytorch-optimizer-sam": Peer(
        "pytorch-optimizer SAM", "SAM", without_model(PytorchOptimizerSAM), missing_package, tolerance=1e-6
    ),
    "pytorch-optimizer-gsam": Peer(
        "pytorch-optimizer GSAM", "GSAM", PytorchOptimizerGSAM, missing_package, tolerance=1e-6
    ),
    "compiled-gam": Peer("compiled eager GAM", "GAM", compiled_gam, missing_compiler),
}
"""The peers, by their keys on the command line."""


def small_model() -> nn.Module:
    """Return a model of two weights, so that a compiler has little to do."""
    return nn.Sequential(nn.Linear(6, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False))


def disagreement(
    peer: Peer,
    base: type[Optimizer] = SGD,
    base_options: dict[str, Any] | None = None,
    method_options: dict[str, Any] | None = None,
    *,
    build: Callable[[], nn.Module] = small_model,
    groups: Callable[[nn.Module], Iterable[Any]] = nn.Module.parameters,
    steps: int = 5,
    backend: str = "auto",
    device: str = "cpu",
) -> float:
    r"""Return the distance between the trajectories of ``peer`` and of gam_fast's method, in fp64 on equal batches.

    .. math:: \max_{t, i} \frac{‖p_{t,i} − q_{t,i}‖}{‖q_{t,i} − q_{0,i}‖}

    over steps t and parameters i, with p of the peer and q of gam_fast. It is relative to the way that a parameter has
    moved, because the optimizer decides that. It is infinite if a parameter is NaN or has not moved. A peer is timed if
    this is at most its :attr:`Peer.tolerance`.

    Args:
        peer: the peer.
        base: class of the base optimizer.
        base_options: its arguments; default: those of SGD with momentum and weight decay.
        method_options: hyper-parameters; default: those of the method.
        build: makes the model, of 6 inputs and 3 classes.
        groups: returns the parameters of a model, or groups of them.
        steps: number of steps, each with its own batch.
        backend: backend of gam_fast.
        device: device of both.
    """
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2} if base_options is None else base_options
    hyper = method_options or {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double()
        batches = [(torch.randn(12, 6, dtype=torch.float64), torch.randint(3, (12,))) for _ in range(steps)]
    model = model.to(device)
    twin = deepcopy(model)
    optimizers: list[tuple[nn.Module, Stepper]] = [
        (model, peer.make(model, base, options, hyper, groups(model))),
        (twin, getattr(gam_fast, peer.method)(groups(twin), base, backend=backend, model=twin, **options, **hyper)),
    ]
    start = [p.detach().clone() for p in twin.parameters()]
    apart = []
    for x, y in batches:
        for module, optimizer in optimizers:
            optimizer.step(partial(_loss, module, x.to(device), y.to(device)))
        with torch.no_grad():
            trajectories = zip(model.parameters(), twin.parameters(), start, strict=True)
            apart += [(p - q).norm() / (q - q0).norm() for p, q, q0 in trajectories]
    return float(torch.stack(apart).nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss
