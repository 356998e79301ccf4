"""The mathematics as plain loops, one function a method, written from the papers' formulas and not from the engine.

Each function takes ``gradient``, a function from a list of tensors (the parameters' values) to the list of gradients at
them, the values θ, and hyper-parameters that are numbers or, where groups differ, one number per parameter. It returns
the direction for the base optimizer. Run in fp64 it is the oracle of every other path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Vector = list[Tensor]
Gradient = Callable[[Vector], Vector]
XI = 1e-12


def per_parameter(value, theta: Vector) -> list[float]:
    return list(value) if isinstance(value, list) else [value] * len(theta)


def dot(a: Vector, b: Vector) -> Tensor:
    return sum(
        ((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)), torch.zeros((), dtype=torch.float64)
    )


def norm(a: Vector) -> Tensor:
    return dot(a, a).sqrt()


def combine(*terms: tuple[object, Vector]) -> Vector:
    """Σ coefficient · vector, the coefficient a number or one number per parameter."""
    length = len(terms[0][1])
    out = []
    for i in range(length):
        total = 0.0
        for coefficient, vector in terms:
            c = coefficient[i] if isinstance(coefficient, list) else coefficient
            total = total + c * vector[i]
        out.append(total)
    return out


def lengths(v: Vector, radii: list, groups: list[int] | None) -> list[Tensor]:
    """‖v‖ + ξ for each parameter, over those of its group, or over all; what has None as its ρ is not in the norm."""
    own = groups or [0] * len(v)
    return [norm([x for x, r, h in zip(v, radii, own, strict=True) if r is not None and h == g]) + XI for g in own]


NORMS: list[int] | None = None
"""For each parameter the group whose norm counts for it, or one norm over all."""


def climb(origin: Vector, along: Vector, radius) -> Vector:
    """origin + ρ v / (‖v‖ + ξ); what has None as its ρ stays in place."""
    radii = per_parameter(radius, origin)
    rows = zip(origin, along, radii, lengths(along, radii, NORMS), strict=True)
    return [o if r is None else o + r * v / size for o, v, r, size in rows]


def project_out(m: Vector, u: Vector) -> Vector:
    """m less its part along u."""
    uu = dot(u, u)
    factor = dot(m, u) / uu if uu > 0 else 0.0
    return [x - factor * y for x, y in zip(m, u, strict=True)]


def pair(value) -> tuple[object, object]:
    if isinstance(value, tuple):
        return value
    if isinstance(value, list):
        return value, [1 - v for v in value]
    return value, 1 - value


def base(gradient: Gradient, theta: Vector) -> Vector:
    return gradient(theta)


def sam(gradient: Gradient, theta: Vector, *, rho) -> Vector:
    g0 = gradient(theta)
    return gradient(climb(theta, g0, rho))


def asam(gradient: Gradient, theta: Vector, *, rho, eta) -> Vector:
    g0 = gradient(theta)
    etas = per_parameter(eta, theta)  # None for T = 1
    t = [torch.ones_like(w) if e is None else w.abs() + e for w, e in zip(theta, etas, strict=True)]
    radii = per_parameter(rho, theta)
    size = norm([a * b for a, b, r in zip(t, g0, radii, strict=True) if r is not None]) + XI
    return gradient(
        [w if r is None else w + r * a * a * g / size for w, r, a, g in zip(theta, radii, t, g0, strict=True)]
    )


def gsam(gradient: Gradient, theta: Vector, *, rho, alpha) -> Vector:
    g0 = gradient(theta)
    g1 = gradient(climb(theta, g0, rho))
    orthogonal = project_out(g0, g1)
    alphas = per_parameter(alpha, theta)
    return [x - a * y for x, y, a in zip(g1, orthogonal, alphas, strict=True)]


def gradient_norm_penalty(gradient: Gradient, theta: Vector, *, rho, alpha) -> Vector:
    g0 = gradient(theta)
    g1 = gradient(climb(theta, g0, rho))
    of_g1, of_g0 = pair(alpha)
    return combine((of_g0, g0), (of_g1, g1))


def four_gradients(gradient: Gradient, theta: Vector, rho, rho_prime) -> tuple[Vector, Vector, Vector, Vector]:
    """The path of GAM, which C-Flat and FAD share."""
    g0 = gradient(theta)
    g1 = gradient(climb(theta, g0, rho_prime))
    h0 = combine((1.0, g1), (-1.0, g0))
    theta_2 = climb(theta, h0, rho)
    g2 = gradient(theta_2)
    g3 = gradient(climb(theta_2, g2, rho_prime))
    return g0, g1, g2, g3


def gam(gradient: Gradient, theta: Vector, *, rho, rho_prime, alpha, beta, gamma) -> Vector:
    g0, g1, g2, g3 = four_gradients(gradient, theta, rho, rho_prime)
    a1, a3 = pair(alpha)
    b0, b2 = pair(beta)
    h_plus = combine((a1, g1), (a3, g3))
    h_minus = combine((b0, g0), (b2, g2))
    orthogonal = project_out(h_minus, h_plus)
    gammas = per_parameter(gamma, theta)
    return [x - c * y for x, y, c in zip(h_plus, orthogonal, gammas, strict=True)]


def cflat(gradient: Gradient, theta: Vector, *, rho, lam) -> Vector:
    _, g1, g2, g3 = four_gradients(gradient, theta, rho, rho)
    lams = per_parameter(lam, theta)
    return [a + k * (c - b) for a, b, c, k in zip(g1, g2, g3, lams, strict=True)]


def fad(gradient: Gradient, theta: Vector, *, rho, rho_prime, alpha, lam) -> Vector:
    g0, g1, g2, g3 = four_gradients(gradient, theta, rho, rho_prime)
    alphas, lams = per_parameter(alpha, theta), per_parameter(lam, theta)
    return [
        (1 - k * a) * w + k * a * x - k * (1 - a) * y + k * (1 - a) * z
        for w, x, y, z, a, k in zip(g0, g1, g2, g3, alphas, lams, strict=True)
    ]


def exact_gam(gradient: Gradient, theta: Vector, *, rho, alpha, product, sam_rho=None) -> Vector:
    """Algorithm 1. ``product(values, v)`` is the Hessian at the values times v."""
    g = gradient(theta)
    f = product(theta, combine((1 / (norm(g) + XI), g)))
    theta_adv = climb(theta, f, rho)
    g_adv = gradient(theta_adv)
    h = product(theta_adv, combine((1 / (norm(g_adv) + XI), g_adv)))
    g_loss = g if sam_rho is None else gradient(climb(theta, g, sam_rho))
    rhos, alphas = per_parameter(rho, theta), per_parameter(alpha, theta)
    return [x + a * r * y for x, y, a, r in zip(g_loss, h, alphas, rhos, strict=True)]


# Methods that keep something from one step to the next. ``state`` lives as long as the optimizer; the caller sets in it
# "step" (from 0), "momentum" (the base optimizer's, or None, for each parameter) and "used" (a function that says which
# parameters had a gradient in the last call of ``gradient``), and after the base step takes lr · "after" off θ, where a
# function has set that. A parameter without a gradient keeps what it had, and moves along its own memory only where the
# point is chosen before there is a gradient.


def remembered(state: dict, theta: Vector) -> list:
    return state.setdefault("memory", [None] * len(theta))


def radii_where(flags: list[bool], radius, theta: Vector) -> list:
    return [r if flag else None for r, flag in zip(per_parameter(radius, theta), flags, strict=True)]


def filled(vector: list, theta: Vector) -> Vector:
    return [torch.zeros_like(w) if v is None else v for v, w in zip(vector, theta, strict=True)]


def friendly_sam(gradient: Gradient, theta: Vector, *, state: dict, rho, sigma, lam) -> Vector:
    """Along g₀ − σ m, then m ← λ m + (1 − λ) g₀, m = g₀ at first (Li et al. 2024; code nblt/F-SAM)."""
    g0, used, memory = gradient(theta), state["used"](), remembered(state, theta)
    sigmas, lams = per_parameter(sigma, theta), per_parameter(lam, theta)
    along = [g if m is None else g - s * m for g, m, s in zip(g0, memory, sigmas, strict=True)]
    for i, g in enumerate(g0):
        if used[i]:
            memory[i] = g.clone() if memory[i] is None else lams[i] * memory[i] + (1 - lams[i]) * g
    return gradient(climb(theta, along, radii_where(used, rho, theta)))


def vasso(gradient: Gradient, values: Vector, *, state: dict, rho, theta) -> Vector:
    """Along m ← (1 − θ) m + θ g₀, m = g₀ at first (Li and Giannakis 2023; code BingcongLi/VaSSO)."""
    g0, used, memory = gradient(values), state["used"](), remembered(state, values)
    thetas = per_parameter(theta, values)
    for i, g in enumerate(g0):
        if used[i]:
            memory[i] = g.clone() if memory[i] is None else (1 - thetas[i]) * memory[i] + thetas[i] * g
    return gradient(climb(values, filled(memory, values), radii_where(used, rho, values)))


def momentum_sam(gradient: Gradient, theta: Vector, *, state: dict, rho) -> Vector:
    """The gradient at θ − ρ v / ‖v‖, v the base optimizer's momentum (Becker et al. 2024; code MarlonBecker/MSAM)."""
    momentum = state["momentum"]
    down = combine((-1.0, filled(momentum, theta)))
    return gradient(climb(theta, down, radii_where([v is not None for v in momentum], rho, theta)))


def previous_gradient_sam(gradient: Gradient, theta: Vector, *, state: dict, rho) -> Vector:
    """The gradient at θ + ρ p / ‖p‖, p the gradient that the last step used (Ji et al. 2024, S²-SAM)."""
    memory = remembered(state, theta)
    g = gradient(climb(theta, filled(memory, theta), radii_where([p is not None for p in memory], rho, theta)))
    for i, flag in enumerate(state["used"]()):
        if flag:
            memory[i] = g[i].clone()
    return g


def look_sam(gradient: Gradient, theta: Vector, *, state: dict, rho, k, alpha) -> Vector:
    """SAM every k-th step, which keeps g_v, g₁ less its part along g₀; between, g₀ + α ‖g₀‖ g_v / ‖g_v‖ (Liu 2022)."""
    g0, used, memory = gradient(theta), state["used"](), remembered(state, theta)
    if state["step"] % k == 0:
        g1 = gradient(climb(theta, g0, rho))
        for i, g in enumerate(project_out(g1, g0)):
            if used[i]:
                memory[i] = g
        return g1
    g_v = filled(memory, theta)
    ratio = norm(g0) / (norm(g_v) + XI)
    alphas = per_parameter(alpha, theta)
    return [g + a * ratio * v if u else g for g, v, a, u in zip(g0, g_v, alphas, used, strict=True)]


def wsam(gradient: Gradient, theta: Vector, *, state: dict, rho, gamma, decouple) -> Vector:
    """With α = γ / (1 − γ), g₀ + α (g₁ − g₀), or g₀ and then θ ← θ − lr α (g₁ − g₀) (Yue et al. 2023; code ATorch)."""
    g0 = gradient(theta)
    g1 = gradient(climb(theta, g0, rho))
    sharpness = [c / (1 - c) * (y - x) for x, y, c in zip(g0, g1, per_parameter(gamma, theta), strict=True)]
    state["after"] = sharpness if decouple else None
    return g0 if decouple else combine((1.0, g0), (1.0, sharpness))


def cr_sam(gradient: Gradient, theta: Vector, *, state: dict, rho, gamma, beta) -> Vector:
    """g₊ + γ (g₊ + g₋ − 2 g₀) + β (g₊ − g₋), at θ ± ρ g₀ / ‖g₀‖ (Wu et al. 2024; code TrustAIoT/CR-SAM)."""
    g0 = gradient(theta)
    plus = gradient(climb(theta, g0, rho))
    minus = gradient(climb(theta, combine((-1.0, g0)), rho))
    gammas, betas = per_parameter(gamma, theta), per_parameter(beta, theta)
    return [p + c * (p + m - 2 * g) + b * (p - m) for g, p, m, c, b in zip(g0, plus, minus, gammas, betas, strict=True)]


def scaled_gradient(gradient: Gradient, theta: Vector, g0: Vector, rho, scale) -> Vector:
    """The gradient at θ + scale(ρ, ‖g₀‖, i) g₀; what has None as its ρ stays in place."""
    radii = per_parameter(rho, theta)
    rows = zip(theta, g0, radii, lengths(g0, radii, NORMS), strict=True)
    return gradient([w if r is None else w + scale(r, size, i) * g for i, (w, g, r, size) in enumerate(rows)])


def sagm(gradient: Gradient, theta: Vector, *, state: dict, rho, alpha) -> Vector:
    """½ (g₀ + g₁), g₁ at θ + (ρ / ‖g₀‖ − α) g₀ (Wang et al. 2023; code Wang-pengfei/SAGM)."""
    g0, alphas = gradient(theta), per_parameter(alpha, theta)
    g1 = scaled_gradient(gradient, theta, g0, rho, lambda r, size, i: r / size - alphas[i])
    return combine((0.5, g0), (0.5, g1))


def usam(gradient: Gradient, theta: Vector, *, state: dict, rho, lam) -> Vector:
    """The gradient at θ + ρ (1 − λ + λ / ‖g₀‖) g₀ (Oikonomou and Loizou 2025; code dimitris-oik/unifiedsam)."""
    g0, lams = gradient(theta), per_parameter(lam, theta)
    return scaled_gradient(gradient, theta, g0, rho, lambda r, size, i: r * (1 - lams[i] + lams[i] / size))


def stable_sam(gradient: Gradient, theta: Vector, *, state: dict, rho) -> Vector:
    """g₁ with the length of g₀ (Tan et al. 2024, SSAM; code cltan023/stablesam2024)."""
    g0 = gradient(theta)
    g1 = gradient(climb(theta, g0, rho))
    return combine((norm(g0) / norm(g1) if norm(g1) > 0 else 0.0, g1))
