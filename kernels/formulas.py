"""The formulas of ``csrc/math.h``, rounded in the same places, as functions of blocks and of scalars.

The symbols are those of ``gam_fast/backends/base.py``. Elements are in the working precision, fp64 for float64 and fp32
otherwise. Scalars are fp64, and are rounded to the working precision where they meet elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def root(x):
    """Return the square root, rounded to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Return the quotient, rounded to nearest."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def inverse_norm(square):
    """Return ``1 / (‖v‖ + ξ)``."""
    return 1.0 / (tl.sqrt(square) + 1e-12)


@triton.jit
def ratio(numerator, square):
    """Return ``numerator / square``, or 0 if the square is 0 or NaN."""
    return tl.where(square > 0.0, numerator / square, 0.0)


@triton.jit
def square_of_direction(uu, um, mm, gamma, kappa):
    """Return ``‖d‖²`` of the direction d = a u − γ m with a = 1 + γ κ."""
    a = 1.0 + gamma * kappa
    return a * a * uu - 2.0 * a * gamma * um + gamma * gamma * mm


@triton.jit
def clip_factor(square, limit):
    """Return ``min(1, limit / (‖d‖ + 1e-6))``."""
    factor = limit / (tl.sqrt(tl.where(square < 0.0, 0.0, square)) + 1e-6)
    return tl.where(factor > 1.0, 1.0, factor)


@triton.jit
def weigh(v, theta, eta):
    """Return T v, with the elementwise radius T = |θ| + η of adaptive recipes."""
    return v * (tl.abs(theta) + eta.to(v.dtype))


@triton.jit
def perturbed(origin, v, factor):
    """Return ``origin + factor v``."""
    return tl.fma(factor.to(v.dtype), v, origin)


@triton.jit
def folded(into, other, k, l):  # noqa: E741
    """Return ``k into + l other``."""
    return tl.fma(l.to(into.dtype), other, k.to(into.dtype) * into)


# The steps of base optimizers. They take the numbers of a parameter group and of a leaf in the order of
# ``csrc/math.h``, and return the new parameter and the new state. State that a leaf does not have is 0, and is not
# stored.


@triton.jit
def with_decay(d, theta, maximize, weight_decay):
    """Return ``±d + λ θ``; if λ is 0, without the product, so that an infinite θ gives no NaN."""
    weight_decay = weight_decay.to(d.dtype)
    sign = tl.where(maximize != 0.0, -1.0, 1.0).to(d.dtype)
    return tl.fma(weight_decay, tl.where(weight_decay != 0.0, theta, 0.0), sign * d)


@triton.jit
def interpolate(a, b, weight):
    """Return ``a + weight (b − a)``, computed from the nearer end, as torch.lerp does."""
    near = weight < 0.5
    weight = weight.to(a.dtype)
    return tl.fma(tl.where(near, weight, weight - 1.0), b - a, tl.where(near, a, b))


@triton.jit
def sgd(d, theta, state, group, leaf):
    """Take a step of torch.optim.SGD; the state is the momentum buffer, which starts as d in a leaf's first step."""
    lr, momentum, dampening, weight_decay, nesterov, maximize = group
    d = with_decay(d, theta, maximize, weight_decay)
    momentum = momentum.to(d.dtype)
    of_direction = tl.where(leaf[0] != 0.0, 1.0, 1.0 - dampening).to(d.dtype)
    buffer = tl.fma(of_direction, d, momentum * state[0])
    along = tl.where(nesterov != 0.0, tl.fma(momentum, buffer, d), buffer)
    return tl.fma(-lr.to(d.dtype), along, theta), (buffer,)


@triton.jit
def adam(d, theta, state, group, leaf):
    """Take a step of torch.optim.Adam or AdamW; the state is m, v and, with amsgrad, the largest v so far."""
    beta1, beta2, eps, weight_decay, shrink, maximize = group
    step_size, root_correction = leaf
    d = with_decay(d, theta, maximize, weight_decay)
    m = interpolate(state[0], d, 1.0 - beta1)
    v = tl.fma((1.0 - beta2).to(d.dtype) * d, d, beta2.to(d.dtype) * state[1])
    largest = tl.where(state[2] >= v, state[2], v)  # v itself without amsgrad
    denominator = divide(root(largest), root_correction.to(d.dtype)) + eps.to(d.dtype)
    return theta * shrink.to(d.dtype) + divide(-step_size.to(d.dtype) * m, denominator), (m, v, largest)


@triton.jit
def lion(d, theta, state, group, leaf):
    """Take a step of Lion (arXiv 2302.06675) as in pytorch-optimizer; the state is m."""
    lr, beta1, beta2, weight_decay, shrink, maximize = group
    d = with_decay(d, theta, maximize, weight_decay)
    c = interpolate(state[0], d, 1.0 - beta1)
    sign = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, 0.0)).to(d.dtype)
    m = interpolate(state[0], d, 1.0 - beta2)
    return tl.fma(-lr.to(d.dtype), sign, theta * shrink.to(d.dtype)), (m,)


@triton.jit
def assign(d, theta, state, group, leaf):
    """Return the direction in place of the parameter, without state or numbers."""
    return d, state
