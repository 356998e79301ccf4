"""Variants of SAM with two or three gradients per step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from typing_extensions import Unpack

from . import recipes
from .bases import Given
from .optimizer import SharpnessAwareOptimizer
from .options import Options, OptionsWithAlpha, documented


@documented
class FriendlySAM(SharpnessAwareOptimizer):
    r"""SAM along the batch-specific part of the gradient. Two passes, and a memory of 1 N.

    .. math:: v = g_0 - σ\, m, \qquad m ← λ\, m + (1-λ)\, g_0, \qquad d = g(θ + ρ\, v/‖v‖)

    A parameter without m is perturbed along its gradient, which becomes m (``gradient_average`` in the state).

    Source: Li, Zhou, He, Cheng, Huang, CVPR 2024, arXiv 2403.12350; the order of operations is that of the authors'
    code. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation.
        sigma: σ, weight of the average that is subtracted.
        lam: λ, decay of the average, from 0 to 1.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = FriendlySAM([weight], torch.optim.SGD, lr=0.25, rho=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2 at 1, then 3 at 1.5
    >>> weight.item()
    0.25
    """

    recipe = recipes.FRIENDLY_SAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.2,
        sigma: float = 1.0,
        lam: float = 0.6,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, sigma=sigma, lam=lam, **options)


@documented
class VaSSO(SharpnessAwareOptimizer):
    r"""SAM along an average of gradients (variance-suppressed). Two passes, and a memory of 1 N.

    .. math:: m ← (1-θ)\, m + θ\, g_0, \qquad d = g(w + ρ\, m/‖m‖)

    θ is here the weight of the newest gradient, and w the parameters. A parameter without m uses its gradient
    (``gradient_average`` in the state).

    Source: Li, Giannakis, NeurIPS 2023, arXiv 2309.15639. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation.
        theta: θ, weight of the newest gradient, from 0 to 1.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = VaSSO([weight], torch.optim.SGD, lr=0.25, rho=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2 at 1, then 3 at 1.5
    >>> weight.item()
    0.25
    """

    recipe = recipes.VASSO

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.05,
        theta: float = 0.4,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, theta=theta, **options)


@documented
class LookSAM(SharpnessAwareOptimizer):
    r"""SAM in every k-th step, whose result the steps between reuse. 1 + 1/k passes, and a memory of 1 N.

    .. math::
        \text{every k-th:}\quad & d = g_1, \quad m = g_1 - \frac{⟨g_1, g_0⟩}{‖g_0‖^2}\, g_0, \\
        \text{between:}\quad & d = g_0 + α \frac{‖g_0‖}{‖m‖}\, m

    Norms and products are over all parameters, as in the paper; m is ``sharpness_direction`` in the state. Where
    :math:`g_1` is parallel to :math:`g_0`, m is 0.

    Source: Liu, Mai, Chen, Hsieh, You, CVPR 2022, arXiv 2203.02714. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation.
        k: the first of every k steps is one of SAM. (Other methods call this option ``interval``.)
        alpha: α, weight of m.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = LookSAM([weight], torch.optim.SGD, lr=0.25, rho=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2 at 1, then 3 at 1.5
    >>> weight.item()
    0.25
    """

    recipe = recipes.LOOK_SAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.05,
        k: int = 5,
        alpha: float = 0.7,
        **options: Unpack[Options],
    ) -> None:
        if "interval" in options:
            raise TypeError(f"LookSAM: interval is called k here, got interval={options['interval']!r}")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"LookSAM: k must be a positive integer, got {k!r}")
        own: dict[str, Any] = {"rho": rho, "alpha": alpha, "interval": k}
        super().__init__(params, base_optimizer, **own, **options)


@documented
class WSAM(SharpnessAwareOptimizer):
    r"""SAM with a decoupled sharpness term, like the weight decay of AdamW. Two passes.

    .. math:: θ ← \text{base}(θ, g_0) - η\, \frac{γ}{1-γ}\, (g_1 - g_0)

    η is the learning rate of the base optimizer, whose steps should be proportional to it. With ``decouple=False`` the
    base optimizer gets :math:`g_0 + \frac{γ}{1-γ} (g_1 - g_0)`. ``clip_grad_norm`` limits the direction that the base
    optimizer gets.

    Source: Yue, Jiang, Ye, Gao, Liu, Zhang, KDD 2023, arXiv 2305.15817. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation.
        gamma: γ, weight of the sharpness, at least 0 and below 1; with ``decouple=False``, 0.5 is SAM.
        decouple: whether the sharpness term bypasses the base optimizer.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = WSAM([weight], torch.optim.SGD, lr=0.25, rho=0.5, gamma=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2 at 1, then 3 at 1.5
    >>> weight.item()
    0.25

    Raises:
        ValueError: ``sync="local"`` with ``decouple``.
        TypeError: with ``decouple``, a base optimizer whose ``lr`` is not a number.
    """

    recipe = recipes.WSAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.05,
        gamma: float = 0.9,
        decouple: bool = True,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        if not decouple:
            self.recipe = recipes.COUPLED_WSAM  # type: ignore[misc]  # of this instance
        elif options.get("sync") == "local":
            raise ValueError("WSAM: decouple=True with sync='local': pass decouple=False, or sync='global'")
        super().__init__(params, base_optimizer, rho=rho, gamma=gamma, **options)


@documented
class CRSAM(SharpnessAwareOptimizer):
    r"""SAM with a penalty on the curvature along the gradient. Three passes.

    .. math:: g_± = g(θ ± ρ\, g_0/‖g_0‖), \qquad d = g_+ + γ\, (g_+ + g_- - 2 g_0) + β\, (g_+ - g_-)

    Source: Wu, Luo, Wunsch, AAAI 2024, arXiv 2312.13555. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of both perturbations.
        gamma: γ, weight of the second difference of gradients.
        beta: β, weight of the first difference; with β = γ, g₋ cancels.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = CRSAM([weight], torch.optim.SGD, lr=0.25, rho=0.5, beta=0.0)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2 at 1, 3 at 1.5, 1 at 0.5
    >>> weight.item()
    0.25
    """

    recipe = recipes.CR_SAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.1,
        gamma: float = 0.1,
        beta: float = 0.01,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, gamma=gamma, beta=beta, **options)


@documented
class SAGM(SharpnessAwareOptimizer):
    r"""Sharpness-aware gradient matching, for domain generalization. Two passes.

    .. math:: d = \tfrac{1}{2}\, (g_0 + g_1), \qquad g_1 = g\left(θ + \left(\tfrac{ρ}{‖g_0‖} - α\right) g_0\right)

    Source: Wang, Zhang, Lei, Zhang, CVPR 2023, arXiv 2303.10353. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation.
        alpha: α, length, in gradients, of the descent step that is matched with the perturbation.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = SAGM([weight], torch.optim.SGD, lr=0.25, rho=0.75, alpha=0.125)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2 at 1, then 3 at 1.5
    >>> weight.item()
    0.375
    """

    recipe = recipes.SAGM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.05,
        alpha: float = 0.001,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, alpha=alpha, **options)


@documented
class USAM(SharpnessAwareOptimizer):
    r"""SAM with an unnormalized or partly normalized perturbation. Two passes.

    .. math:: d = g\left(θ + ρ \left(1 - λ + \tfrac{λ}{‖g_0‖}\right) g_0\right)

    With λ = 0 the perturbation is not normalized; λ = 1 is SAM.

    Source: Oikonomou, Loizou, ICLR 2025, arXiv 2503.02225. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation; with λ = 0, a multiple of the gradient.
        lam: λ, from 0 to 1.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = USAM([weight], torch.optim.SGD, lr=0.25, rho=0.25)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2 at 1, then 3 at 1.5
    >>> weight.item()
    0.25
    """

    recipe = recipes.USAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.05,
        lam: float = 0.0,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, lam=lam, **options)


@documented
class StableSAM(SharpnessAwareOptimizer):
    r"""SAM with its gradient rescaled to the length of the gradient at θ. Two passes.

    .. math:: d = \frac{‖g_0‖}{‖g_1‖}\, g_1, \qquad g_1 = g(θ + ρ\, g_0/‖g_0‖)

    Source: Tan, Zhang, Liu, Wang, Hao, JMLR 26, 2025, arXiv 2401.07250. Errors: :class:`SharpnessAwareOptimizer`.

    Args:
        params: as everywhere.
        rho: ρ, radius of the perturbation.
        options: those of every method.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = StableSAM([weight], torch.optim.SGD, lr=0.25, rho=0.5)
    >>> for turn in optimizer.passes():
    ...     weight.square().sum().backward()     # 2 at 1; 3 at 1.5, scaled to 2
    >>> weight.item()
    0.5
    """

    recipe = recipes.STABLE_SAM

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        rho: float = 0.05,
        **options: Unpack[OptionsWithAlpha],
    ) -> None:
        super().__init__(params, base_optimizer, rho=rho, **options)
