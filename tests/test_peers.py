"""The peers of the benchmarks: each takes the steps of the method it stands for, or says why it cannot."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import gam_fast
from bench.peers import PEERS, disagreement

# raised inside torch's compiler, when it is imported
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
