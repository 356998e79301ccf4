"""Variants of SAM with one gradient per step: they perturb along a vector from before the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import recipes
from .bases import Given
from .noise import DRAWS
from .optimizer import SharpnessAwareOptimizer
from .options import OptionsWithAlpha, documented


@documented
class MomentumSAM(SharpnessAwareOptimizer):
    r"""SAM along the momentum of the base optimizer, at the cost of the base optimizer. One pass.

    .. math:: d = g(θ - ρ\, v/‖v‖), \qquad v = \text{the momentum after the last update}

    v is SGD's ``momentum_buffer``, Adam's ``exp_avg``, or a state of another base optimizer with one of these names. A
    parameter without momentum is not perturbed, so the first step is a plain base optimizer step. Between steps the
    parameters are at θ, so checkpoints and evaluation need no special care.

    Source: Becker, Altrock, Risse, arXiv 2401.12033. Weight decay here acts on θ; in the authors' code it acts on the
    perturbed parameters. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation; the paper uses 0.3 for SGD and 1 for AdamW.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = MomentumSAM([weight], torch.optim.SGD, lr=0.25, momentum=0.5, rho=0.25)
    >>> for step in range(2):
    ...     for turn in optimizer.passes():
    ...         weight.square().sum().backward()     # 2 at 1; then at 0.5 - 0.25
    >>> weight.item()
    0.125

    Raises:
        ValueError: the base optimizer has momentum=0 in all groups, or is a ZeroRedundancyOptimizer.
        RuntimeError: the base optimizer's state has no momentum under a known name.
    """

    recipe = recipes.MOMENTUM_SAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.3,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, **options)
        if all(group.get("momentum") == 0 and "betas" not in group for group in self.param_groups):
            raise ValueError(
                f"MomentumSAM perturbs along its base optimizer's momentum, and this {type(self.base).__name__} has "
                "momentum=0: pass momentum=0.9, or a base optimizer such as AdamW"
            )


@documented
class PreviousGradientSAM(SharpnessAwareOptimizer):
    r"""SAM along the gradient of the previous step (S²-SAM). One pass, and a memory of 1 N.

    .. math:: d_t = g(θ_t + ρ\, d_{t-1}/‖d_{t-1}‖)

    A parameter without a previous gradient (``previous_gradient`` in the state) is not perturbed.

    Source: Ji et al., NeurIPS 2024. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = PreviousGradientSAM([weight], torch.optim.SGD, lr=0.25, rho=0.25)
    >>> for step in range(2):
    ...     for turn in optimizer.passes():
    ...         weight.square().sum().backward()     # 2 at 1; then at 0.5 + 0.25
    >>> weight.item()
    0.125
    """

    recipe = recipes.PREVIOUS_GRADIENT_SAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.05,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, **options)


@documented
class RandomSAM(SharpnessAwareOptimizer):
    r"""The gradient at a random point nearby (random weight perturbation). One pass.

    .. math:: d = g(θ + ε), \qquad ε_l = ρ \frac{‖θ_l‖}{\sqrt{n_l}}\, z, \quad z ∼ N(0, 1)

    for each tensor θ_l of n_l elements: the root mean square of the noise's length is ρ ‖θ_l‖. A separate generator
    draws it, and it costs no memory except the backup.

    Source: Li, Yan, Lin, Bai, Wang, Huang, arXiv 2211.11489, where the noise is scaled per row; per tensor, as here, in
    Flat-LoRA, arXiv 2409.14396. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, length of the noise relative to that of the tensor.
        seed: seed of the noise, the same on all ranks. The noise of a step depends on the seed of the first group and
            on the number of the step.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = RandomSAM([weight], torch.optim.SGD, lr=0.25, rho=0.0)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # no noise: the gradient at 1
    >>> weight.item()
    0.5
    """

    recipe = recipes.RANDOM_SAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.01,
        seed: int = 0,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        self._check_seed(seed)
        super().__init__(params, base_optimizer, rho=rho, seed=seed, **options)

    def _kept(self) -> dict[str, float]:
        return {DRAWS: 0, **super()._kept()}

    def _check_hyper(self, group: dict[str, Any]) -> None:
        super()._check_hyper(group)
        self._check_seed(group.get("seed", 0))

    @staticmethod
    def _check_seed(seed: object) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"RandomSAM: seed must be an integer that is not negative, got {seed!r}")


@documented
class FedLESAM(SharpnessAwareOptimizer):
    r"""SAM along a direction that the user sets, such as a client's way to the last global model. One pass.

    .. math:: d = g(θ + ρ\, v/‖v‖)

    v is the argument of :meth:`set_direction` (``direction`` in the state; a memory of 1 N). A parameter without a
    direction is not perturbed. In FedLESAM v is the client's previous global model minus its present one, and there is
    none in the first round. Checkpoints contain the direction once a step was taken with it.

    Source: Fan, Hu, Yao, Tian, Zhang, Sugiyama, Wang, ICML 2024, arXiv 2405.18890, by the paper's formulas; the default
    is ours. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = FedLESAM([weight], torch.optim.SGD, lr=0.25, rho=0.5)
    >>> optimizer.set_direction([torch.tensor([7.0])])
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 3 at 1.5
    >>> weight.item()
    0.25
    """

    recipe = recipes.FED_LESAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.01,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, **options)

    def set_direction(self, direction: Sequence[Tensor]) -> None:
        """Set the direction of the next steps; the tensors are copied.

        Args:
            direction: a tensor for each parameter, in the order of the groups; an empty list for no perturbation.

        Raises:
            ValueError: not one finite tensor of its shape for each parameter; nothing is changed then.
            RuntimeError: during a step.
        """
        self._refuse_nesting("set_direction()")
        params, vectors = list(self._parameters()), list(direction)
        if vectors and len(vectors) != len(params):
            raise ValueError(
                f"set_direction() needs a tensor for each of the {len(params)} parameters, in the order of the groups, "
                f"got {len(vectors)}"
            )
        for i, (param, vector) in enumerate(zip(params, vectors, strict=False)):
            if not isinstance(vector, Tensor) or not bool(vector.isfinite().all()):
                raise ValueError(f"set_direction(): tensor {i} must be a finite tensor, got {vector!r:.60}")
            if vector.shape != param.shape:
                raise ValueError(
                    f"set_direction(): tensor {i} must be of the shape of its parameter, {tuple(param.shape)}, got "
                    f"{tuple(vector.shape)}"
                )
        for param in params if not vectors else ():
            if param in self.state:
                self.state[param].pop("direction", None)
        for param, vector in zip(params, vectors, strict=False):
            own = torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)
            self.state[param]["direction"] = own.copy_(vector.detach())
