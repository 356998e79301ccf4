"""``torch.nn.utils.parametrize.cached()`` or autocast around a step: no pass gets the weights of another."""

from __future__ import annotations

import contextlib

import pytest
import torch
from cases import FORMS, METHODS, loss_of, make, pairwise, take_step
from torch import nn
from torch.nn.utils import parametrize

import gam_fast


class Symmetric(nn.Module):
    """Saves nothing for its backward, so that torch itself does not notice a stale weight."""

    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


class Squared(nn.Module):
    """Saves its input for its backward: a stale weight is an error of torch."""

    def forward(self, weight):
        return weight**2


def in_bf16():
    return torch.autocast("cpu", torch.bfloat16)


def model_of(parametrization):
    if parametrization is in_bf16:
        return make("mlp", torch.float32)
    _, batches = make("mlp")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    parametrize.register_parametrization(model[0], "weight", parametrization())
    return model, batches


@pytest.mark.parametrize(
    ("method_name", "form", "parametrization"),
    pairwise(["base", "sam", "gam"], FORMS, [Symmetric, Squared, in_bf16]),
)
def test_the_cache_serves_one_pass(method_name, form, parametrization):
    """The cache of autocast, of converted weights, lives as long as the outermost one."""
    method, found = METHODS[method_name], []
    inside, outside = contextlib.nullcontext, parametrize.cached
    if parametrization is in_bf16:
        inside = outside = in_bf16
    for around in (False, True):
        model, batches = model_of(parametrization)
        optimizer = method.optimizer(model.parameters(), torch.optim.SGD, lr=0.1, **method.hyper)
        losses = []

        def closure(model=model, losses=losses, batches=batches):
            with inside():
                loss = loss_of(model, *batches[0])
            loss.backward()
            losses.append(loss.item())

        with outside() if around else contextlib.nullcontext():
            for _ in range(2):
                take_step(optimizer, closure, form)
            with inside():
                losses.append(loss_of(model, *batches[0]).item())  # of the weights after the step
        found.append((losses, *model.parameters()))
    (plain, *expected), (cached, *params) = found
    assert cached == plain
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))


def test_within_a_pass_the_cache_serves_as_it_does_in_torch_and_an_undone_step_leaves_no_moved_weight():
    model, batches = model_of(Symmetric)
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, rho_prime=0.5)
    before = loss_of(model, *batches[0]).item()

    def closure(turn):
        weight = model[0].weight
        assert model[0].weight is weight
        loss_of(model, *batches[0]).backward()
        if turn.last:
            raise KeyError

    with parametrize.cached():
        with pytest.raises(KeyError):
            optimizer.step(closure)
        assert loss_of(model, *batches[0]).item() == before
