"""Gradient norm Aware Minimization and its family, as fast optimizers for PyTorch.

>>> import torch, gam_fast
>>> model = torch.nn.Linear(2, 1)
>>> optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model)
>>> for turn in optimizer.passes():
...     model(torch.ones(4, 2)).square().mean().backward()
"""

from ._torch_version import require_torch
from ._version import __version__

require_torch()

from . import active, backends, buffers, flatness, integrations, recipes, rng, schedules, subsets  # noqa: E402
from .finite import NonFiniteGradientError  # noqa: E402
from .hvp import SecondDerivativeError  # noqa: E402
from .methods import ASAM, FAD, GAM, GSAM, SAM, Base, CFlat, ExactGAM, GradientNormPenalty  # noqa: E402
from .one_pass import FedLESAM, MomentumSAM, PreviousGradientSAM, RandomSAM  # noqa: E402
from .optimizer import SharpnessAwareOptimizer  # noqa: E402
from .turn import Turn, first_pass  # noqa: E402
from .variants import CRSAM, SAGM, USAM, WSAM, FriendlySAM, LookSAM, StableSAM, VaSSO  # noqa: E402

__all__ = [
    "ASAM",
    "Base",
    "CFlat",
    "ExactGAM",
    "FAD",
    "SharpnessAwareOptimizer",
    "GAM",
    "GSAM",
    "GradientNormPenalty",
    "NonFiniteGradientError",
    "SAM",
    "CRSAM",
    "FedLESAM",
    "FriendlySAM",
    "LookSAM",
    "MomentumSAM",
    "PreviousGradientSAM",
    "RandomSAM",
    "SAGM",
    "StableSAM",
    "USAM",
    "VaSSO",
    "WSAM",
    "SecondDerivativeError",
    "Turn",
    "__version__",
    "active",
    "backends",
    "buffers",
    "first_pass",
    "flatness",
    "integrations",
    "recipes",
    "rng",
    "schedules",
    "subsets",
]
