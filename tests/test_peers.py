"""The peers of the benchmarks: each takes the steps of the method it stands for, or says why it cannot."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from cases import BACKENDS, METHODS, closure_of, make
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
"""Those that take a second, not half a minute."""


def hyper_of(peer):
    return {name: FAR[name] for name in getattr(gam_fast, peer.method).recipe.defaults}


def two_groups(model):
    first, *rest = model.parameters()
    return [{"params": [first], "lr": 0.03, "weight_decay": 0.2}, {"params": rest}]


@pytest.mark.parametrize("key", PEERS)
def test_the_trajectory_is_that_of_gam_fast(key):
    """Of the compiler: nothing is compiled after the second step; norms, which change, are no constants to it."""
    peer = PEERS[key]
    assert peer.missing() is None
    counters.clear()
    assert disagreement(peer, method_options=hyper_of(peer)) <= peer.tolerance
    assert counters["stats"]["unique_graphs"] == (9 if key == "compiled-gam" else 0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("key", WITHOUT_COMPILER)
def test_it_is_with_every_base_optimizer(key, base):
    peer = PEERS[key]
    assert disagreement(peer, *BASES[base]) <= peer.tolerance
    assert disagreement(peer, *BASES[base], hyper_of(peer), groups=two_groups) <= peer.tolerance


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_on_every_backend(backend):
    assert disagreement(PEERS["plain-gam"], backend=backend) <= PEERS["plain-gam"].tolerance


def group_radii(model):
    first, *rest = model.parameters()
    return [{"params": [first], "rho": 0.3}, {"params": rest, "rho": 0.05}]


@pytest.mark.parametrize("key", ["plain-gam", "plain-sam", "pytorch-optimizer-sam"])
def test_groups_may_have_radii_of_their_own(key):
    assert disagreement(PEERS[key], groups=group_radii) <= PEERS[key].tolerance


def normalised():
    layers = [nn.Linear(6, 9, bias=False), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.0), nn.Linear(9, 3)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("key", WITHOUT_COMPILER)
def test_it_is_with_batch_normalisation(key):
    """Which uses the statistics of the batch in training: where the running ones go has no part in the trajectory."""
    peer = PEERS[key]
    assert disagreement(peer, build=normalised, groups=two_groups) <= peer.tolerance


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
def test_parameters_without_a_gradient_stay(key):
    model, ((x, y), *_) = make("partly_used")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = PEERS[key].make(model, torch.optim.SGD, SGD, {})
    first, second = (optimizer.step(closure_of(model, x, y)) for _ in range(2))
    assert second.item() < first.item()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(("unused", "frozen")), name


@pytest.mark.parametrize("key", WITHOUT_COMPILER)
def test_a_step_clears_gradients_and_returns_the_loss_at_the_weights(key):
    peer = PEERS[key]
    model, ((x, y), *_) = make("mlp")
    losses = []

    def closure():
        assert all(p.grad is None for p in model.parameters())
        losses.append(closure_of(model, x, y)())
        return losses[-1]

    closure_of(model, x, y)()  # gradients that somebody has left
    loss = peer.make(model, torch.optim.SGD, SGD, {}).step(closure)
    assert torch.equal(loss, losses[0])
    assert len(losses) == getattr(gam_fast, peer.method).recipe.passes


@pytest.mark.parametrize(
    ("key", "imposter"), [("plain-gam", "plain-sam"), ("plain-sam", "pytorch-optimizer-gsam"), ("plain-gam", None)]
)
def test_another_method_or_another_radius_disagrees(key, imposter):
    """What is checked before timing would notice, γ smaller by a hundredth too."""
    peer = PEERS[key]
    if imposter is None:
        gamma = getattr(gam_fast, peer.method).recipe.defaults["gamma"]
        other = peers.Peer(
            "", peer.method, lambda *given, **hyper: peer.build(*given, **{**hyper, "gamma": 0.99 * gamma})
        )
    else:
        defaults = getattr(gam_fast, PEERS[imposter].method).recipe.defaults
        other = peers.Peer("", peer.method, lambda *given, **hyper: PEERS[imposter].build(*given, **defaults))
    assert disagreement(other) > 100 * peer.tolerance


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_peer_that_leaves_the_numbers_disagrees(value):
    class Broken(peers.PlainSAM):
        def step(self, closure):
            self.param_groups[0]["params"][0].data.fill_(value)

    assert disagreement(peers.Peer("", "SAM", peers.without_model(Broken))) == float("inf")


@pytest.mark.parametrize("key", ["pytorch-optimizer-sam", "pytorch-optimizer-gsam"])
def test_a_package_that_cannot_be_imported_is_named(key, monkeypatch):
    assert PEERS[key].missing() is None
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    assert "pip install pytorch-optimizer" in PEERS[key].missing()


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "a C++ compiler, and no-such-compiler is not found" in PEERS["compiled-gam"].missing()


@pytest.mark.parametrize("key", ["plain-gam", "plain-sam"])
def test_a_plain_loop_needs_nothing(key):
    assert PEERS[key].missing() is None


def test_the_compiled_peer_refuses_what_would_compile_without_end():
    compiled = partial(PEERS["compiled-gam"].make, method_options={})
    with pytest.raises(ValueError, match="needs SGD as base, got AdamW"):
        compiled(nn.Linear(2, 2), torch.optim.AdamW, {"lr": 0.1})
    for shapes, got in (([1] * 17, "17 of 17"), ([5_000_000], "1 of 5000000")):
        many = nn.ParameterList(torch.zeros(shape) for shape in shapes)
        with pytest.raises(ValueError, match=f"at most 16 parameters of 4194304 elements together, got {got}"):
            compiled(many, torch.optim.SGD, SGD)
