r"""The methods as data: each is one recipe in the language of :mod:`gam_fast.recipe`.

To add a method, add one recipe here and one class in :mod:`gam_fast.methods`.
"""

from __future__ import annotations

from dataclasses import replace

from .recipe import (
    MEMORY,
    MOMENTUM,
    NOISE,
    Bounds,
    HessianProduct,
    Hyperparameters,
    Memory,
    Perturbation,
    Recipe,
    Share,
    Value,
    fold_plan,
)

__all__ = ["RECIPES", "Bounds", "HessianProduct", "Memory", "Perturbation", "Recipe", "Share", "Value", "fold_plan"]


def _product(hyper: Hyperparameters) -> float:
    return float(hyper["lam"]) * float(hyper["alpha"])


def _one_minus_product(hyper: Hyperparameters) -> float:
    return 1.0 - _product(hyper)


def _rest_product(hyper: Hyperparameters) -> float:
    return float(hyper["lam"]) * (1.0 - float(hyper["alpha"]))


def _minus_rest_product(hyper: Hyperparameters) -> float:
    return -_rest_product(hyper)


def _weight_of_flatness(hyper: Hyperparameters) -> float:
    return float(hyper["alpha"]) * float(hyper["rho"])


def _friendly_keep(hyper: Hyperparameters) -> float:
    return float(hyper["lam"]) + (1.0 - float(hyper["lam"])) * float(hyper["sigma"])


def _odds(hyper: Hyperparameters) -> float:
    return float(hyper["gamma"]) / (1.0 - float(hyper["gamma"]))


def _one_minus_odds(hyper: Hyperparameters) -> float:
    return 1.0 - _odds(hyper)


def _cr_plus(hyper: Hyperparameters) -> float:
    return 1.0 + float(hyper["gamma"]) + float(hyper["beta"])


def _cr_minus(hyper: Hyperparameters) -> float:
    return float(hyper["gamma"]) - float(hyper["beta"])


def _normalized(hyper: Hyperparameters) -> float:
    return float(hyper["rho"]) * float(hyper["lam"])


def _not_normalized(hyper: Hyperparameters) -> float:
    return float(hyper["rho"]) * (1.0 - float(hyper["lam"]))


_SAM_PATH = (Perturbation(along=0, radius="rho"),)


def _gam_path(rho: str, rho_prime: str) -> tuple[Perturbation, ...]:
    """Return the path of GAM: θ; θ + ρ' ĝ0; θ2 = θ + ρ ĥ0 with h0 = g1 − g0; θ2 + ρ' ĝ2."""
    return (Perturbation(0, rho_prime), Perturbation(1, rho, minus=0, from_start=True), Perturbation(2, rho_prime))


BASE = Recipe(name="Base", citation="the base optimizer alone, one pass", defaults={}, path=(), u=(1.0,))

SAM = Recipe(
    name="SAM",
    citation="Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization, ICLR 2021, arXiv 2010.01412",
    defaults={"rho": 0.05},
    path=_SAM_PATH,
    u=(None, 1.0),
)

ASAM = Recipe(
    name="ASAM",
    citation="Kwon, Kim, Park, Choi, ASAM: Adaptive Sharpness-Aware Minimization, ICML 2021, arXiv 2102.11600",
    defaults={"rho": 0.5, "eta": 0.0},
    path=_SAM_PATH,
    u=(None, 1.0),
    adaptive="eta",
)

GSAM = Recipe(
    name="GSAM",
    citation="Zhuang et al., Surrogate Gap Minimization Improves Sharpness-Aware Training, ICLR 2022, arXiv 2203.08065",
    defaults={"rho": 0.04, "alpha": 0.4},
    path=_SAM_PATH,
    u=(None, 1.0),
    m=(1.0, None),
    gamma="alpha",
)

GRADIENT_NORM_PENALTY = Recipe(
    name="GradientNormPenalty",
    citation="Zhao, Zhang, Hu, Penalizing Gradient Norm for Efficiently Improving Generalization, ICML 2022, "
    "arXiv 2202.03599",
    defaults={"rho": 0.05, "alpha": 0.8},
    path=_SAM_PATH,
    u=(Share("alpha", 1), Share("alpha", 0)),
)

GAM = Recipe(
    name="GAM",
    citation="Zhang, Xu, Yu, Zou, Cui, Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves "
    "Generalization, CVPR 2023, arXiv 2303.03108, Algorithm 2",
    defaults={"rho": 0.2, "rho_prime": 0.02, "alpha": 0.6, "beta": 0.5, "gamma": 0.03},
    path=_gam_path("rho", "rho_prime"),
    difference="rho_prime",
    u=(None, Share("alpha", 0), None, Share("alpha", 1)),
    m=(Share("beta", 0), None, Share("beta", 1), None),
    gamma="gamma",
)

CFLAT = Recipe(
    name="CFlat",
    citation="Bian et al., Make Continual Learning Stronger via C-Flat, NeurIPS 2024, arXiv 2404.00986",
    defaults={"rho": 0.2, "lam": 0.2},
    path=_gam_path("rho", "rho"),
    u=(None, 1.0, Value("lam", -1.0), Value("lam")),
)

FAD = Recipe(
    name="FAD",
    citation="Zhang, Xu, Yu, Zou, Cui, Flatness-Aware Minimization for Domain Generalization, ICCV 2023, "
    "arXiv 2307.11108",
    defaults={"rho": 0.05, "rho_prime": 0.05, "alpha": 0.5, "lam": 0.5},
    path=_gam_path("rho", "rho_prime"),
    difference="rho_prime",
    u=(_one_minus_product, _product, _minus_rest_product, _rest_product),
)

EXACT_GAM = Recipe(
    name="ExactGAM",
    citation=GAM.citation.replace("Algorithm 2", "Algorithm 1"),
    defaults={"rho": 0.2, "alpha": 0.1},
    path=(HessianProduct(), Perturbation(1, "rho", from_start=True), HessianProduct()),
    u=(1.0, None, None, _weight_of_flatness),
)
"""The vectors are g0, f = H g0/‖g0‖, the gradient at θ + ρ f/‖f‖, and its product."""

EXACT_GAM_WITH_SAM = replace(
    EXACT_GAM,
    citation=f"{EXACT_GAM.citation}; with the gradient of SAM: {SAM.citation}",
    defaults={**EXACT_GAM.defaults, "sam_rho": 0.05},
    path=(
        HessianProduct(),
        Perturbation(0, "sam_rho", from_start=True),
        Perturbation(1, "rho", from_start=True),
        HessianProduct(),
    ),
    u=(None, None, 1.0, None, _weight_of_flatness),
)
"""As :data:`EXACT_GAM`, with the gradient of SAM in place of g0."""

FRIENDLY_SAM = Recipe(
    name="FriendlySAM",
    citation="Li, Zhou, He, Cheng, Huang, Friendly Sharpness-Aware Minimization, CVPR 2024, arXiv 2403.12350",
    defaults={"rho": 0.2, "sigma": 1.0, "lam": 0.6},
    path=_SAM_PATH,
    u=(None, 1.0),
    # m ← λ m + (1−λ) g with g = v + σ m, computed from v
    memory=Memory("gradient_average", (1.0, Value("sigma", -1.0)), (_friendly_keep, Share("lam", 1))),
    bounds={"lam": Bounds()},
)

VASSO = Recipe(
    name="VaSSO",
    citation="Li, Giannakis, Enhancing Sharpness-Aware Optimization Through Variance Suppression, NeurIPS 2023, "
    "arXiv 2309.15639",
    defaults={"rho": 0.05, "theta": 0.4},
    path=_SAM_PATH,
    u=(None, 1.0),
    memory=Memory("gradient_average", (Value("theta"), Share("theta", 1)), (0.0, 1.0)),
    bounds={"theta": Bounds()},
)

MOMENTUM_SAM = Recipe(
    name="MomentumSAM",
    citation="Becker, Altrock, Risse, Momentum-SAM: Sharpness Aware Minimization without Computational Overhead, "
    "arXiv 2401.12033",
    defaults={"rho": 0.3},
    path=(),
    u=(1.0,),
    before=Perturbation(MOMENTUM, "rho", size=Value("rho", -1.0)),
)

PREVIOUS_GRADIENT_SAM = Recipe(
    name="PreviousGradientSAM",
    citation="Ji et al., A Single-Step, Sharpness-Aware Minimization is All You Need to Achieve Efficient and Accurate "
    "Sparse Training, NeurIPS 2024 (S²-SAM)",
    defaults={"rho": 0.05},
    path=(),
    u=(1.0,),
    before=Perturbation(MEMORY, "rho"),
    memory=Memory("previous_gradient", update=(0.0, 1.0)),
)

FED_LESAM = Recipe(
    name="FedLESAM",
    citation="Fan, Hu, Yao, Tian, Zhang, Sugiyama, Wang, Locally Estimated Global Perturbations are Better than Local "
    "Perturbations for Federated Sharpness-aware Minimization, ICML 2024, arXiv 2405.18890",
    defaults={"rho": 0.01},
    path=(),
    u=(1.0,),
    before=Perturbation(MEMORY, "rho"),
    memory=Memory("direction"),
)

LOOK_SAM = Recipe(
    name="LookSAM",
    citation="Liu, Mai, Chen, Hsieh, You, Towards Efficient and Scalable Sharpness-Aware Minimization, CVPR 2022, "
    "arXiv 2203.02714",
    defaults={"rho": 0.05, "alpha": 0.7},
    path=_SAM_PATH,
    u=(None, 1.0),
    memory=Memory("sharpness_direction", orthogonal=True),
    between=Recipe(
        name="LookSAM",
        citation="the steps between those of SAM",
        defaults={"alpha": 0.7},
        path=(),
        u=(1.0,),
        memory=Memory("sharpness_direction", add=Value("alpha")),
    ),
)

WSAM = Recipe(
    name="WSAM",
    citation="Yue, Jiang, Ye, Gao, Liu, Zhang, Sharpness-Aware Minimization Revisited: Weighted Sharpness as a "
    "Regularization Term, KDD 2023, arXiv 2305.15817",
    defaults={"rho": 0.05, "gamma": 0.9},
    path=_SAM_PATH,
    u=(1.0, None),
    after=_odds,
    bounds={"gamma": Bounds(below=True)},
)

COUPLED_WSAM = replace(WSAM, u=(_one_minus_odds, _odds), after=None)
"""As :data:`WSAM`, but the direction contains the sharpness term."""

CR_SAM = Recipe(
    name="CRSAM",
    citation="Wu, Luo, Wunsch, CR-SAM: Curvature Regularized Sharpness-Aware Minimization, AAAI 2024, arXiv 2312.13555",
    defaults={"rho": 0.1, "gamma": 0.1, "beta": 0.01},
    path=(Perturbation(0, "rho"), Perturbation(0, "rho", from_start=True, size=Value("rho", -1.0))),
    u=(Value("gamma", -2.0), _cr_plus, _cr_minus),
)

SAGM = Recipe(
    name="SAGM",
    citation="Wang, Zhang, Lei, Zhang, Sharpness-Aware Gradient Matching for Domain Generalization, CVPR 2023, "
    "arXiv 2303.10353",
    defaults={"rho": 0.05, "alpha": 0.001},
    path=(Perturbation(0, "rho", multiple=Value("alpha", -1.0)),),
    u=(0.5, 0.5),
)

USAM = Recipe(
    name="USAM",
    citation="Oikonomou, Loizou, Sharpness-Aware Minimization: General Analysis and Improved Rates, ICLR 2025, "
    "arXiv 2503.02225",
    defaults={"rho": 0.05, "lam": 0.0},
    path=(Perturbation(0, "rho", size=_normalized, multiple=_not_normalized),),
    u=(None, 1.0),
    bounds={"lam": Bounds()},
)

STABLE_SAM = Recipe(
    name="StableSAM",
    citation="Tan, Zhang, Liu, Wang, Hao, Stabilizing Sharpness-Aware Minimization Through a Simple Renormalization "
    "Strategy, JMLR 26, 2025, arXiv 2401.07250",
    defaults={"rho": 0.05},
    path=_SAM_PATH,
    u=(None, 1.0),
    rescale=True,
)

RANDOM_SAM = Recipe(
    name="RandomSAM",
    citation="Li, Yan, Lin, Bai, Wang, Huang, Efficient Generalization Improvement Guided by Random Weight "
    "Perturbation, arXiv 2211.11489",
    defaults={"rho": 0.01, "seed": 0},
    path=(),
    u=(1.0,),
    before=Perturbation(NOISE, "rho", size=0.0, multiple=Value("rho")),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *(BASE, SAM, ASAM, GSAM, GRADIENT_NORM_PENALTY, GAM, EXACT_GAM, CFLAT, FAD),
        *(FRIENDLY_SAM, VASSO, MOMENTUM_SAM, PREVIOUS_GRADIENT_SAM, LOOK_SAM, WSAM, CR_SAM, SAGM, USAM, STABLE_SAM),
        *(RANDOM_SAM, FED_LESAM),
    )
}
"""All recipes by name."""
