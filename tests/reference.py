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
Radius = "float | list[float]"
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


def climb(origin: Vector, along: Vector, radius) -> Vector:
    """origin + ρ v / (‖v‖ + ξ); what has None as its ρ stays in place, and is not in the norm."""
    radii = per_parameter(radius, origin)
    size = norm([v for v, r in zip(along, radii, strict=True) if r is not None]) + XI
    return [o if r is None else o + r * v / size for o, v, r in zip(origin, along, radii, strict=True)]


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
    t = [w.abs() + e for w, e in zip(theta, per_parameter(eta, theta), strict=True)]
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
