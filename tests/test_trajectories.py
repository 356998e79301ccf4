"""Whole trajectories against the plain loops of reference.py, for every method, base optimizer and model."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from cases import (
    ALL,
    BASES,
    DTYPES,
    FORMS,
    INTERPRETED,
    MODELS,
    VARIANTS,
    closure_of,
    loss_of,
    make,
    pairwise,
    take_step,
    weights_and_biases,
)
from snapshots import assert_close

from gam_fast.stored import MOMENTA

STEPS = 3 if INTERPRETED else 20
"""Triton's interpreter takes a second a step."""


def reference_step(model, optimizer, method, hyper, x, y):
    """One step of ``method`` by the book: plain gradients, the direction in ``grad``, torch's own optimizer."""
    params = [p for p in model.parameters() if p.requires_grad]
    sign = -1.0 if optimizer.param_groups[0].get("maximize") else 1.0
    used: list[bool] = []

    def gradient(values):
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
        model.zero_grad()
        (sign * loss_of(model, x, y)).backward()
        used[:] = [p.grad is not None for p in params]
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]

    theta = [p.detach().clone() for p in params]
    if method in VARIANTS.values():
        state = optimizer.__dict__.setdefault("state_of_reference", {"step": 0})
        state["used"] = lambda: list(used)
        kept = [
            next((each.state[p] for each in getattr(optimizer, "members", [optimizer]) if p in each.state), {})
            for p in params
        ]
        state["momentum"] = [next((own[n] for n in MOMENTA if own.get(n) is not None), None) for own in kept]
        hyper = {**hyper, "state": state}
    direction = method.reference(gradient, theta, **hyper)
    with torch.no_grad():
        for p, value, d, takes_part in zip(params, theta, direction, used, strict=True):
            p.copy_(value)
            p.grad = sign * d if takes_part else None
    optimizer.step()
    if method in VARIANTS.values():
        rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for p, w in zip(params, state.get("after") or [0.0] * len(params), strict=True):
                if p.grad is not None:  # a hook has not taken it out
                    p.sub_(rates[p] * w)
        state["step"] += 1


def assert_same_steps(optimizer, ours, plain, theirs, method, hyper, batches):
    """Some steps of both, by a closure and by a loop in turns, end at the same parameters."""
    for k in range(STEPS):
        x, y = batches[k % len(batches)]
        take_step(optimizer, closure_of(ours, x, y), FORMS[k % 2])
        reference_step(theirs, plain, method, hyper, x, y)
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("model_name", "method_name", "base_name"), pairwise(MODELS, ALL, BASES))
def test_agrees_with_the_plain_loops_in_fp64(model_name, method_name, base_name):
    if method_name == "momentum_sam" and base_name == "sgd":  # refused
        base_name = "sgd_nesterov"
    method, build = ALL[method_name], BASES[base_name]
    ours, batches = make(model_name)
    theirs = copy.deepcopy(ours)
    optimizer = method.optimizer(ours.parameters(), build, model=ours, **method.hyper)
    plain = build([p for p in theirs.parameters() if p.requires_grad])
    assert_same_steps(optimizer, ours, plain, theirs, method, method.hyper, batches)


@pytest.mark.parametrize("method_name", ALL)
def test_groups_may_differ_in_every_hyper_parameter(method_name):
    method = ALL[method_name]
    ours, batches = make("mlp")
    theirs = copy.deepcopy(ours)
    half = {name: 0.5 * method.hyper[name] for name in method.of_groups}
    values, others = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}, {"lr": 0.3, "weight_decay": 0.0}
    groups = weights_and_biases(ours, **others, **half)
    optimizer = method.optimizer(groups, torch.optim.SGD, **values, **method.hyper)
    plain = torch.optim.SGD(weights_and_biases(theirs, **others), **values)
    each = {n: [method.hyper[n] if p.dim() > 1 else half[n] for p in theirs.parameters()] for n in half}
    assert_same_steps(optimizer, ours, plain, theirs, method, {**method.hyper, **each}, batches)


def quadratic(dtype):
    """½ (x−t)ᵀ A (x−t) over two tensors; its gradient is computed in fp64 and rounded once to ``dtype``."""
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(24, 24, dtype=torch.float64, generator=generator) / 24**0.5
    matrix = root @ root.T + 0.1 * torch.eye(24, dtype=torch.float64)
    target = torch.randn(24, dtype=torch.float64, generator=generator)
    start = torch.randn(24, dtype=torch.float64, generator=generator)
    params = [torch.nn.Parameter(start[:10].to(dtype)), torch.nn.Parameter(start[10:].view(2, 7).to(dtype))]

    def gradient(values):
        flat = torch.cat([v.detach().double().flatten() for v in values])
        g = matrix @ (flat - target)
        return [g[:10], g[10:].view(2, 7)]

    return params, gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method_name", ALL)
def test_one_step_in_low_precision_stays_within_the_derived_bound(method_name, dtype):
    """Against the fp64 reference that rounds what must be stored, the points and the gradients, and nothing else.

    What is left of the error, per coordinate and in units of eps of the dtype: a stored fold of two gradients (1 |g|);
    a rounding that falls to the other side because of fp32 arithmetic, in a point (Λ |θ| in the gradient there) or in a
    gradient (1 |g|), in each of the passes; and the rounding of the new parameter (1 |θ|). Here |·| is the largest
    entry and Λ the largest absolute row sum of the Hessian.
    """
    method = ALL[method_name]
    params, gradient = quadratic(dtype)
    theta = [p.detach().double().clone() for p in params]
    seen = []

    def rounded(values):
        seen.append([v.to(dtype).double() for v in values])
        return [g.to(dtype).double() for g in gradient(seen[-1])]

    state = {"step": 0, "momentum": [None, None], "used": lambda: [True, True]}
    more = {"state": state} if method_name in VARIANTS else {}
    direction = method.reference(rounded, theta, **method.hyper, **more)
    if state.get("after"):
        direction = [d + w for d, w in zip(direction, state["after"], strict=True)]
    optimizer = method.optimizer(params, torch.optim.SGD, lr=0.5, momentum=0.5, **method.hyper)
    for _ in optimizer.passes():
        for p, g in zip(params, gradient(params), strict=True):
            p.grad = g.to(dtype)

    def largest(vectors):
        return max(float(v.abs().max()) for vector in vectors for v in vector)

    eps = torch.finfo(dtype).eps
    points, grads = largest(seen), largest([gradient(point) for point in seen])
    row_sum = float(hessian(gradient).abs().sum(1).max())
    error = eps * (2 * grads + row_sum * points) if dtype in (torch.float16, torch.bfloat16) else 0.0
    # fp32 and fp64 arithmetic itself: a difference of gradients is divided by its norm.
    working = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    error += 64 * working * (grads + row_sum * points)
    bound = 0.5 * error + eps * points
    for p, value, d in zip(params, theta, direction, strict=True):
        assert (p.detach().double() - (value - 0.5 * d)).abs().max() <= bound
    assert bound <= 0.1 * 0.5 * largest([direction])  # the bound says something


def hessian(gradient):
    unit = torch.eye(24, dtype=torch.float64)
    at_zero = gradient([torch.zeros(10), torch.zeros(2, 7)])
    rows = [gradient([e[:10], e[10:].view(2, 7)]) for e in unit]
    return torch.stack([torch.cat([(g - o).flatten() for g, o in zip(r, at_zero, strict=True)]) for r in rows])


def test_the_reference_knows_a_closed_form():
    """GAM on L = ½ a x²: by hand, at x > 0 every move goes outwards, g_i = a x_i."""
    a, x, rho, rho_prime = 2.0, 3.0, 0.5, 0.25
    direction = reference.gam(
        lambda values: [a * v for v in values],
        [torch.tensor([x], dtype=torch.float64)],
        rho=rho,
        rho_prime=rho_prime,
        alpha=0.25,
        beta=0.5,
        gamma=0.1,
    )
    expected = a * (0.25 * (x + rho_prime) + 0.75 * (x + rho + rho_prime))
    torch.testing.assert_close(direction[0], torch.tensor([expected], dtype=torch.float64))
