"""What algorithm and papers say must coincide, and the finite difference against the exact Hessian-vector product."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import METHODS, MULTIPASS, closure_of, loss_of, make
from snapshots import assert_equal
from torch import nn

import gam_fast


def run(optimizer_class, model_name="mlp", steps=8, **hyper):
    model, batches = make(model_name)
    optimizer = optimizer_class(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model, **hyper)
    for k in range(steps):
        optimizer.step(closure_of(model, *batches[k % len(batches)]))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


GAM, SAM, FAD = gam_fast.GAM, gam_fast.SAM, gam_fast.FAD
PENALTY = gam_fast.GradientNormPenalty
SAME = {
    "GAM of α = β = 1 is GSAM": (
        (GAM, {"rho": 0.7, "rho_prime": 0.1, "alpha": 1.0, "beta": 1.0, "gamma": 0.3}),
        (gam_fast.GSAM, {"rho": 0.1, "alpha": 0.3}),
    ),
    "GAM of α = 1, γ = 0 is SAM": (
        (GAM, {"rho": 0.7, "rho_prime": 0.1, "alpha": 1.0, "beta": 0.4, "gamma": 0.0}),
        (SAM, {"rho": 0.1}),
    ),
    "the penalty of α = 1 is SAM": ((PENALTY, {"rho": 0.1, "alpha": 1.0}), (SAM, {"rho": 0.1})),
    "the penalty of α = 0 is the base": ((PENALTY, {"rho": 0.1, "alpha": 0.0}), (gam_fast.Base, {})),
    "C-Flat of λ = 0 is SAM": ((gam_fast.CFlat, {"rho": 0.1, "lam": 0.0}), (SAM, {"rho": 0.1})),
    "FAD of α = 1 is the penalty": (
        (FAD, {"rho": 0.3, "rho_prime": 0.1, "alpha": 1.0, "lam": 0.6}),
        (PENALTY, {"rho": 0.1, "alpha": 0.6}),
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_methods_that_coincide(what):
    first, second = (run(optimizer, **hyper) for optimizer, hyper in SAME[what])
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MULTIPASS)
def test_with_all_radii_zero_every_method_is_the_base(name):
    method = METHODS[name]
    radii = {move.radius: 0.0 for move in method.optimizer.recipe.path}
    # h₋ and h₊ are then multiples of g, so the orthogonal part is 0 up to rounding; the release's pair does not
    # sum to 1, but only in h₋, whose part along h₊ is taken out.
    result = run(method.optimizer, **{**method.hyper, **radii})
    torch.testing.assert_close(result, run(gam_fast.Base), rtol=1e-11, atol=1e-11)


def test_base_with_sgd_is_torch_sgd_bit_for_bit():
    ours, batches = make("batchnorm_cnn", torch.float32)
    theirs = copy.deepcopy(ours)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
    optimizer = gam_fast.Base(ours.parameters(), torch.optim.SGD, **options)
    plain = torch.optim.SGD(theirs.parameters(), **options)
    for k in range(10):
        x, y = batches[k % len(batches)]
        optimizer.step(closure_of(ours, x, y))
        plain.zero_grad()
        loss_of(theirs, x, y).backward()
        plain.step()
    assert_equal(ours, theirs)


def test_h0_approaches_the_exact_hessian_vector_product_at_first_order():
    """h₀ = g₁ − g₀ of a step of GAM, read off in the loop, against double backward."""
    model, [(x, y), *_] = make("mlp")
    params = list(model.parameters())
    g0 = torch.autograd.grad(loss_of(model, x, y), params, create_graph=True)
    flat = nn.utils.parameters_to_vector(g0)
    direction = (flat / flat.norm()).detach()
    exact = nn.utils.parameters_to_vector(torch.autograd.grad(flat @ direction, params))
    errors = []
    for rho_prime in (1e-2, 1e-3):
        optimizer = gam_fast.GAM(params, torch.optim.SGD, lr=0.0, rho_prime=rho_prime, model=model)
        seen = []
        for _ in optimizer.passes():
            loss_of(model, x, y).backward()
            seen.append(nn.utils.parameters_to_vector([p.grad for p in params]))
        errors.append(float(((seen[1] - seen[0]) / rho_prime - exact).norm() / exact.norm()))
    assert errors[1] < 5e-3
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)
