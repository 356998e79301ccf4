"""The peers of the benchmarks: each takes the steps of the method it stands for, or says why it cannot."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from cases import METHODS, closure_of, make
from torch import nn
from torch._dynamo.utils import counters

import gam_fast
from bench import peers
from bench.peers import PEERS, disagreement

# raised inside torch's compiler, when it is imported
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.2}),
    "sgd_nesterov": (torch.optim.SGD, {**SGD, "nesterov": True}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}),
}
FAR = {"rho": 0.3, "rho_prime": 0.1, "alpha": 0.7, "beta": 0.2, "gamma": 0.4}
"""Hyper-parameters at which every term of a formula counts."""

WITHOUT_COMPILER = [key for key in PEERS if key != "compiled-gam"]


def hyper_of(peer):
    return {name: FAR[name] for name in getattr(gam_fast, peer.method).recipe.defaults}


def two_groups(model):
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 0.03, "weight_decay": 0.2}, {"params": rest}]


def normalised():
    """In training, statistics are those of the batch: where the running ones go has no part in the trajectory."""
    layers = [nn.Linear(6, 9, bias=False), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.0), nn.Linear(9, 3)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("key", WITHOUT_COMPILER)
def test_the_trajectory_is_that_of_gam_fast(key, base):
    peer = PEERS[key]
    assert peer.missing() is None
    assert disagreement(peer) <= peer.tolerance
    assert disagreement(peer, *BASES[base], hyper_of(peer), groups=two_groups, build=normalised) <= peer.tolerance


def test_nothing_is_compiled_after_the_second_step(monkeypatch):
    """Norms change from step to step and are no constants to the compiler; its backend has no part in that."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    peer = PEERS["compiled-gam"]
    assert peer.missing() is None
    counters.clear()
    assert disagreement(peer, method_options=hyper_of(peer)) <= peer.tolerance
    assert counters["stats"]["unique_graphs"] == 9


@pytest.mark.parametrize("key", ["plain-gam", "plain-sam", "pytorch-optimizer-sam"])
def test_groups_may_have_radii_of_their_own(key):
    def groups(model):
        first, *rest = model.parameters()
        return [{"params": [first], "rho": 0.3}, {"params": rest, "rho": 0.05}]

    assert disagreement(PEERS[key], groups=groups) <= PEERS[key].tolerance


@pytest.mark.parametrize(("key", "case"), [("plain-gam", "gam"), ("plain-sam", "sam")])
def test_the_plain_loops_are_the_formulas(key, case):
    """Held against the reference of the tests, which shares no code with gam_fast; one step from θ by plain SGD."""
    model, ((x, y), *_) = make("tied_transformer")
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]

    def gradient(values):
        for p, value in zip(params, values, strict=True):
            p.data.copy_(value)
            p.grad = None
        closure_of(model, x, y)()
        return [p.grad for p in params]

    hyper = METHODS[case].hyper
    expected = METHODS[case].reference(gradient, start, **hyper)
    for p, value in zip(params, start, strict=True):
        p.data.copy_(value)
    optimizer = PEERS[key].make(model, torch.optim.SGD, {"lr": 1.0}, hyper)
    optimizer.step(closure_of(model, x, y))
    for p, value, direction in zip(params, start, expected, strict=True):
        torch.testing.assert_close(p.detach(), value - direction, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("key", WITHOUT_COMPILER)
def test_a_step_clears_gradients_returns_the_loss_and_leaves_parameters_without_a_gradient(key):
    peer = PEERS[key]
    model, ((x, y), *_) = make("partly_used")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []

    def closure():
        assert all(p.grad is None for p in model.parameters())
        losses.append(closure_of(model, x, y)())
        return losses[-1]

    closure_of(model, x, y)()  # gradients that somebody has left
    loss = peer.make(model, torch.optim.SGD, SGD, {}).step(closure)
    assert torch.equal(loss, losses[0])
    assert len(losses) == getattr(gam_fast, peer.method).recipe.passes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("unused", "frozen")), name


class Broken(peers.PlainSAM):
    def step(self, closure):
        self.param_groups[0]["params"][0].data.fill_(float("nan"))


def test_what_is_checked_before_timing_notices_another_method_another_radius_and_nan():
    """γ smaller by a hundredth too."""
    plain = PEERS["plain-gam"]
    gamma = 0.99 * gam_fast.GAM.recipe.defaults["gamma"]
    for method, build in (
        ("GAM", lambda *given, **hyper: PEERS["plain-sam"].build(*given)),
        ("GAM", lambda *given, **hyper: plain.build(*given, **{**hyper, "gamma": gamma})),
        ("SAM", peers.without_model(Broken)),
    ):
        apart = disagreement(peers.Peer("", method, build))
        assert apart > 100 * plain.tolerance
    assert apart == float("inf")


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    for key in ("pytorch-optimizer-sam", "pytorch-optimizer-gsam"):
        assert "pip install pytorch-optimizer" in PEERS[key].missing()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "a C++ compiler, and no-such-compiler is not found" in PEERS["compiled-gam"].missing()


def test_the_compiled_peer_refuses_what_would_compile_without_end():
    compiled = partial(PEERS["compiled-gam"].make, method_options={})
    with pytest.raises(ValueError, match="needs SGD as base, got AdamW"):
        compiled(nn.Linear(2, 2), torch.optim.AdamW, {"lr": 0.1})
    for shapes, got in (([1] * 17, "17 of 17"), ([5_000_000], "1 of 5000000")):
        many = nn.ParameterList(torch.zeros(shape) for shape in shapes)
        with pytest.raises(ValueError, match=f"at most 16 parameters of 4194304 elements together, got {got}"):
            compiled(many, torch.optim.SGD, SGD)
