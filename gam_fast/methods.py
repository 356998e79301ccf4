"""The optimizers that users construct: the engine with one recipe each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import distributed
from typing_extensions import Unpack

from . import recipes
from .bases import Given
from .optimizer import SharpnessAwareOptimizer
from .options import Options, OptionsOfBase, OptionsWithAlpha, documented

Coefficients: TypeAlias = "float | tuple[float, float]"
"""A number ``a``, which means ``(a, 1 - a)``, or the pair itself."""


@documented
class Base(SharpnessAwareOptimizer):
    """The base optimizer alone, with one pass: the same training loop over ``passes()`` works for it.

    Args:
        params: as everywhere.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Base([weight], torch.optim.SGD, lr=0.25)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()
    >>> weight.item()
    0.5
    """

    recipe = recipes.BASE

    def __init__(
        self, params: Iterable[Any] | None, base_optimizer: Given = torch.optim.SGD, **options: Unpack[OptionsOfBase]
    ) -> None:
        super().__init__(params, base_optimizer, **options)


@documented
class SAM(SharpnessAwareOptimizer):
    r"""Sharpness-Aware Minimization: the gradient at :math:`θ + ρ\, g_0/‖g_0‖`. Two passes.

    Source: Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021, arXiv 2010.01412. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = SAM([weight], torch.optim.SGD, lr=0.25, rho=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2 at 1, then 3 at 1.5
    >>> weight.item()
    0.25
    """

    recipe = recipes.SAM

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
class ASAM(SharpnessAwareOptimizer):
    r"""Adaptive SAM: the gradient at :math:`θ + ρ\, T^2 g_0/‖T g_0‖` with :math:`T = |θ| + η` elementwise. Two passes.

    A parameter group with ``adaptive_radius=False`` has T = 1. The authors' code uses T = 1 for all parameters except
    ``weight``: ``ASAM([{"params": weights}, {"params": rest, "adaptive_radius": False}], …, eta=0.01)``.

    Source: Kwon, Kim, Park, Choi, ICML 2021, arXiv 2102.11600. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius relative to the size of the weights.
        eta: η, added to the size of each weight; the authors' code uses 0.01, the definition 0.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = ASAM([weight], torch.optim.SGD, lr=0.25, rho=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # at 2, then at 3
    >>> weight.item()
    0.5
    """

    recipe = recipes.ASAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.5,
        eta: float = 0.0,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, eta=eta, **options)


@documented
class GSAM(SharpnessAwareOptimizer):
    r"""Surrogate Gap SAM: :math:`g_1 − α\, g_{0⊥}`. Two passes, at the points of SAM.

    :math:`g_{0⊥}` is the part of :math:`g_0` orthogonal to :math:`g_1`.

    Source: Zhuang et al., ICLR 2022, arXiv 2203.08065. Errors:
    :class:`SharpnessAwareOptimizer`. The paper lets ρ follow the learning rate:
    :class:`gam_fast.schedules.ProportionalRadius`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation.
        alpha: α, weight of the surrogate gap.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = GSAM([weight], torch.optim.SGD, lr=0.25, rho=0.5, alpha=0.4)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # in one dimension nothing is orthogonal: SAM
    >>> weight.item()
    0.25
    """

    recipe = recipes.GSAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.04,
        alpha: float = 0.4,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, alpha=alpha, **options)


@documented
class GradientNormPenalty(SharpnessAwareOptimizer):
    r"""Penalty on the gradient norm: :math:`(1−α)\, g_0 + α\, g_1` at the points of SAM. Two passes.

    It descends :math:`L + λ‖∇L‖` with :math:`α = λ/ρ`. Source: Zhao, Zhang, Hu, ICML 2022, arXiv 2202.03599.
    Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: r of the paper, radius of the perturbation.
        alpha: α, or the pair ``(weight of g1, weight of g0)``.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = GradientNormPenalty([weight], torch.optim.SGD, lr=0.25, rho=0.5, alpha=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2, then 3
    >>> weight.item()
    0.375
    """

    recipe = recipes.GRADIENT_NORM_PENALTY

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.05,
        alpha: Coefficients = 0.8,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, alpha=alpha, **options)


@documented
class GAM(SharpnessAwareOptimizer):
    r"""Gradient norm Aware Minimization, accelerated (Algorithm 2). Four passes.

    .. math::
        g_0 &= g(θ), & g_1 &= g(θ + ρ'\, g_0/‖g_0‖), & h_0 &= g_1 − g_0, \\
        θ_2 &= θ + ρ\, h_0/‖h_0‖, & g_2 &= g(θ_2), & g_3 &= g(θ_2 + ρ'\, g_2/‖g_2‖), \\
        h_+ &= α g_1 + (1−α) g_3, & h_- &= β g_0 + (1−β) g_2, & d &= h_+ − γ\, h_{-⊥}.

    Source: Zhang, Xu, Yu, Zou, Cui, CVPR 2023, arXiv 2303.03108. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, outer radius: length of the step along the gradient of the gradient norm.
        rho_prime: ρ', radius of the finite differences that approximate Hessian-vector products; it also sets how
            strongly the gradient norm is penalised. ``"auto"`` chooses the most exact radius, which is mostly small
            (:mod:`gam_fast.radius`); ``"auto:bfloat16"`` does so for gradients that autocast computes in bfloat16.
        alpha: α, or a pair ``(weight of g1, weight of g3)``.
        beta: β, or a pair ``(weight of g0, weight of g2)``; ``(1.0, 1 - β)`` reproduces the authors' released code.
        gamma: γ, weight of the part of h₋ orthogonal to h₊.
        options: those of every method.

    The defaults are the paper's for ResNets on CIFAR-100.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = GAM([weight], torch.optim.SGD, lr=0.25, rho=0.5, rho_prime=0.25, alpha=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # at 1, 1.25, 1.5 and 1.75
    >>> weight.item()
    0.25
    """

    recipe = recipes.GAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.2,
        rho_prime: float | str = 0.02,
        alpha: Coefficients = 0.6,
        beta: Coefficients = 0.5,
        gamma: float = 0.03,
        **options: Unpack[Options],
    ) -> None:
        own: dict[str, Any] = {"rho": rho, "rho_prime": rho_prime, "alpha": alpha, "beta": beta, "gamma": gamma}
        super().__init__(params, base_optimizer, **own, **options)


@documented
class ExactGAM(SharpnessAwareOptimizer):
    r"""Gradient norm Aware Minimization with Hessian-vector products (Algorithm 1). Two passes, three with ``sam_rho``.

    .. math::
        f &= H(θ)\, g(θ)/‖g(θ)‖, \qquad θ' = θ + ρ\, f/‖f‖, \\
        d &= g(θ) + α ρ\, H(θ')\, g(θ')/‖g(θ')‖ .

    With ``sam_rho`` the first term is SAM's gradient, :math:`g(θ + ρ_s\, g/‖g‖)`.

    The optimizer differentiates the loss of each pass twice: **the closure returns the loss and does not call
    backward**, and in the loop form the body calls ``turn.backward(loss)``. After a step ``param.grad`` is ``None``.
    ``python -m bench.curvature`` measures time and memory of a step. :class:`GAM` approximates it by four gradients.

    Source: Zhang, Xu, Yu, Zou, Cui, CVPR 2023, arXiv 2303.03108. The defaults are ours: with ρ = .2 and α = .1 the
    weight of the gradient norm, αρ, is the ρ' = .02 of :class:`GAM`. Further errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius: length of the step along the gradient of the gradient norm.
        alpha: α, weight of the first-order flatness :math:`ρ‖∇L(θ')‖` against the loss.
        sam_rho: :math:`ρ_s`, radius of SAM's perturbation; ``None`` for none.
        options: those of every method.

    Raises:
        SecondDerivativeError: an operation of the model has no second derivative (fused attention, a compiled model).
        RuntimeError: backward was called on the loss; or torch.distributed has several processes, which could not
            average their gradients, because the step calls no backward.
        TypeError: the loss is not a tensor of one element.
        ValueError: a group or a loaded state has ``sam_rho``, but the constructor was given none.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = ExactGAM([weight], torch.optim.SGD, lr=0.25, rho=0.5, alpha=0.5)
    >>> optimizer.step(lambda: weight.square().sum())     # the gradient 2, and ρα times the curvature 2
    tensor(1.)
    >>> weight.item()
    0.375
    """

    recipe = recipes.EXACT_GAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.2,
        alpha: float = 0.1,
        sam_rho: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        own: dict[str, Any] = {"rho": rho, "alpha": alpha}
        if sam_rho is not None:
            self.recipe = recipes.EXACT_GAM_WITH_SAM  # type: ignore[misc]  # of this instance
            own["sam_rho"] = sam_rho
        super().__init__(params, base_optimizer, **own, **options)

    def _check_can_step(self) -> None:
        super()._check_can_step()
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise RuntimeError(
                "ExactGAM differentiates the loss without the backward that averages gradients over the "
                f"{distributed.get_world_size()} processes of torch.distributed, so replicas would drift apart: use "
                "GAM, which needs gradients only"
            )

    def _check_hyper(self, group: dict[str, Any]) -> None:
        if "sam_rho" in group and "sam_rho" not in self._keys:
            raise ValueError(
                f"a parameter group has sam_rho={group['sam_rho']!r}, but this ExactGAM was constructed without "
                "sam_rho=, and so without SAM's pass"
            )
        super()._check_hyper(group)


@documented
class CFlat(SharpnessAwareOptimizer):
    r"""C-Flat: :math:`g_1 + λ (g_3 − g_2)` on the path of GAM with one radius. Four passes.

    Source: Bian et al., NeurIPS 2024, arXiv 2404.00986. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of all three perturbations.
        lam: λ, weight of the first-order flatness.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = CFlat([weight], torch.optim.SGD, lr=0.25, rho=0.5, lam=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # at 1, 1.5, 1.5 and 2
    >>> weight.item()
    0.125
    """

    recipe = recipes.CFLAT

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.2,
        lam: float = 0.2,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, lam=lam, **options)


@documented
class FAD(SharpnessAwareOptimizer):
    r"""Flatness-Aware Minimization for domain generalization, on the path of GAM. Four passes.

    .. math:: d = (1−λα)\, g_0 + λα\, g_1 − λ(1−α)\, g_2 + λ(1−α)\, g_3

    Source: Zhang, Xu, Yu, Zou, Cui, ICCV 2023, arXiv 2307.11108. The coefficients come from a secondary source, and the
    defaults are ours. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, outer radius.
        rho_prime: ρ', radius of the finite differences; or ``"auto"``, as in :class:`GAM`.
        alpha: α, share of zeroth-order flatness against first-order flatness.
        lam: λ, weight of both.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = FAD([weight], torch.optim.SGD, lr=0.25, rho=0.5, rho_prime=0.5, alpha=0.5, lam=1.0)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # at 1, 1.5, 1.5 and 2
    >>> weight.item()
    0.25
    """

    recipe = recipes.FAD

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.05,
        rho_prime: float | str = 0.05,
        alpha: float = 0.5,
        lam: float = 0.5,
        **options: Unpack[Options],
    ) -> None:
        own: dict[str, Any] = {"rho": rho, "rho_prime": rho_prime, "alpha": alpha, "lam": lam}
        super().__init__(params, base_optimizer, **own, **options)
