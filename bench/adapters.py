"""Adapters of pytorch-optimizer's SAM and GSAM to gam_fast's closures; :mod:`bench.peers` lists the differences."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gam_fast.backends.scalars import XI


def missing_package() -> str | None:
    """Return why pytorch-optimizer cannot be imported, or None."""
    try:
        importlib.import_module("pytorch_optimizer")
    except ImportError as error:
        return f"pytorch-optimizer cannot be imported ({error}): pip install pytorch-optimizer"
    return None


class PytorchOptimizerSAM:
    """Adapter of pytorch-optimizer's SAM, which takes its first gradient before its step."""

    def __init__(self, params: Any, base: type[Optimizer], base_options: dict[str, Any], *, rho: float) -> None:
        from pytorch_optimizer import SAM

        self.optimizer = SAM(params, base, rho=rho, perturb_eps=XI, **base_options)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Take both gradients and the step of SAM; return the first loss."""
        self.optimizer.zero_grad()
        loss = closure()
        self.optimizer.first_step(zero_grad=True)
        closure()
        self.optimizer.second_step()
        return loss


@dataclass(frozen=True)
class Constant:
    """A constant scheduler of GSAM's radius."""

    rho: float

    def step(self) -> float:
        """Return the radius."""
        return self.rho


class PytorchOptimizerGSAM:
    """Adapter of pytorch-optimizer's GSAM, whose closure clears gradients and returns outputs with the loss."""

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        base: type[Optimizer],
        base_options: dict[str, Any],
        *,
        rho: float,
        alpha: float,
    ) -> None:
        from pytorch_optimizer import GSAM

        instance = base(params, **base_options)
        groups = instance.param_groups
        self.optimizer = GSAM(groups, instance, model, Constant(rho), alpha=alpha, perturb_eps=XI)

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Take a step of GSAM; return the first loss."""

        def forward_backward() -> tuple[None, Tensor]:
            self.optimizer.base_optimizer.zero_grad()
            with torch.enable_grad():
                return None, closure()

        loss: Tensor = self.optimizer.step(forward_backward)[1]
        return loss
