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


def gradient_at(model, x, y, create_graph=False):
    return torch.autograd.grad(loss_of(model, x, y), list(model.parameters()), create_graph=create_graph)


def hessian_vector_product(model, x, y, vector):
    grads = gradient_at(model, x, y, create_graph=True)
    dot = sum((g * v).sum() for g, v in zip(grads, vector, strict=True))
    return torch.autograd.grad(dot, list(model.parameters()))


def h0_of_the_engine(model, x, y, rho_prime, **options):
    """g1 − g0 of a GAM step, read off in the loop."""
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.0, rho_prime=rho_prime, model=model, **options)
    seen = []
    for _ in optimizer.passes():
        loss_of(model, x, y).backward()
        seen.append([p.grad.clone() for p in model.parameters()])
    return [b - a for a, b in zip(seen[0], seen[1], strict=True)], seen[0]


def test_h0_approaches_the_exact_hessian_vector_product_at_first_order():
    model, batches = make("mlp")
    x, y = batches[0]
    g0 = gradient_at(model, x, y)
    size = sum((g**2).sum() for g in g0).sqrt()
    exact = hessian_vector_product(model, x, y, [g / size for g in g0])
    exact = torch.cat([h.flatten() for h in exact])
    errors = []
    for rho_prime in (1e-2, 1e-3):
        h0, _ = h0_of_the_engine(model, x, y, rho_prime)
        errors.append(float((torch.cat([h.flatten() for h in h0]) / rho_prime - exact).norm() / exact.norm()))
    assert errors[1] < 5e-3
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)


@pytest.mark.parametrize("replay", [True, False])
def test_dropout_masks_are_the_same_in_all_passes_unless_switched_off(replay):
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 3)).double()
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.randint(3, (16,))
    start = torch.get_rng_state()
    h0, g0 = h0_of_the_engine(model, x, y, 1e-3, replay_rng=replay)
    size = sum((g**2).sum() for g in g0).sqrt()
    torch.set_rng_state(start)  # the mask of the first pass
    exact = hessian_vector_product(model, x, y, [g / size for g in g0])
    a, b = (torch.cat([t.flatten() for t in ts]) for ts in (h0, exact))
    cosine = float(a @ b / (a.norm() * b.norm()))
    assert (cosine > 0.99) == replay
