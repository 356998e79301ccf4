"""Every formula of ``csrc/math.h`` once more, rounded in the same places: functions of blocks and of scalars.

Symbols are those of ``gam_fast/backends/base.py``. Elements are in the working precision, fp64 for float64 and fp32 for
the rest; scalars are fp64, and rounded to the working precision where they meet elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def root(x):
    """The square root, rounded to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """The quotient, rounded to nearest."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def inverse_norm(square):
    """``1 / (‖v‖ + ξ)``"""
    return 1.0 / (tl.sqrt(square) + 1e-12)


@triton.jit
def ratio(numerator, square):
    """``numerator / square``, and 0 where the square is 0 or not a number"""
    return tl.where(square > 0.0, numerator / square, 0.0)


@triton.jit
def square_of_direction(uu, um, mm, gamma, kappa):
    """``‖d‖²`` of the direction d = a u − γ m with a = 1 + γ κ"""
    a = 1.0 + gamma * kappa
    return a * a * uu - 2.0 * a * gamma * um + gamma * gamma * mm


@triton.jit
def clip_factor(square, limit):
    """``min(1, limit / ‖d‖)``"""
    factor = limit / (tl.sqrt(tl.where(square < 0.0, 0.0, square)) + 1e-6)
    return tl.where(factor > 1.0, 1.0, factor)


@triton.jit
def weigh(v, theta, eta):
    """T v, with the elementwise radius of adaptive recipes T = |θ| + η"""
    return v * (tl.abs(theta) + eta.to(v.dtype))


@triton.jit
def perturbed(origin, v, factor):
    """``origin + factor v``"""
    return tl.fma(factor.to(v.dtype), v, origin)


@triton.jit
def folded(into, other, k, l):  # noqa: E741
    """``k into + l other``"""
    return tl.fma(l.to(into.dtype), other, k.to(into.dtype) * into)


@triton.jit
def sgd_gradient(d, theta, sign, weight_decay):
    """``±d + λ θ``; without decay θ is left out, so that an infinite parameter is not multiplied by 0"""
    decayed = tl.where(weight_decay != 0.0, theta, 0.0)
    return tl.fma(weight_decay, decayed, sign * d)


@triton.jit
def sgd_buffer(d, buffer, momentum, of_direction):
    """``b ← μ b + (1 − τ) d``; the first step, b ← d, has factor 1 and a buffer of zeros"""
    return tl.fma(of_direction, d, momentum * buffer)


@triton.jit
def adam_average(d, average, beta1_to_1):
    """``m + (1 − β₁)(d − m)``, starting at the nearer end, as torch.lerp does; ``beta1_to_1`` is 1 − β₁ in fp64"""
    near = beta1_to_1 < 0.5
    weight = beta1_to_1.to(d.dtype)
    weight = tl.where(near, weight, weight - 1.0)
    return tl.fma(weight, d - average, tl.where(near, average, d))


@triton.jit
def adam_square(d, square, beta2, beta2_to_1):
    """``β₂ v + (1 − β₂) d²``"""
    return tl.fma(beta2_to_1 * d, d, beta2 * square)


@triton.jit
def adam_moved(theta, average, square, step_size, root_correction, eps):
    """``θ − step_size m / (√v / root_correction + ε)``"""
    denominator = divide(root(square), root_correction) + eps
    return theta + divide(-step_size * average, denominator)
