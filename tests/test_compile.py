"""Compiled models: the steps of the uncompiled model, and nothing compiled again after the first of them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cases import FORMS, METHODS, closure_of, loss_of, make, pairwise, take_step
from torch import nn
from torch._dynamo.utils import counters

import gam_fast

METHOD_NAMES = ["base", "sam", "gam"]

# raised inside torch's compiler, when it is imported


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_graphs():
    return counters["stats"]["unique_graphs"]


def optimizer_of(model, method_name, **options):
    method = METHODS[method_name]
    return method.optimizer(
        model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, model=model, **method.hyper, **options
    )


@pytest.mark.parametrize(("method_name", "form", "mode"), pairwise(METHOD_NAMES, FORMS, ["default", "reduce-overhead"]))
def test_nothing_is_compiled_again_after_the_first_step(method_name, form, mode):
    model, batches = make("batchnorm_cnn")
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, mode=mode)
    optimizer, other = optimizer_of(compiled, method_name), optimizer_of(twin, method_name)

    def step(x, y):
        take_step(optimizer, closure_of(compiled, x, y), form)
        take_step(other, closure_of(twin, x, y), form)

    step(*batches[0])
    once = compiled_graphs()
    assert once == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x, y in itertools.islice(itertools.cycle(batches), 1, 9):
            step(x, y)
    assert compiled_graphs() == once
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-9)
    assert int(model.net[1].num_batches_tracked) == 9


def test_evaluation_between_steps_is_compiled_once():
    model, batches = make("batchnorm_cnn")
    compiled = torch.compile(model)
    optimizer = optimizer_of(compiled, "gam")
    found = []
    for x, y in batches:
        compiled.train()
        optimizer.step(closure_of(compiled, x, y))
        compiled.eval()
        with torch.no_grad():
            compiled(x)
        found.append(compiled_graphs())
    assert found == [2] * len(batches)


def test_compiled_dropout_has_the_same_masks_in_every_pass():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    compiled = torch.compile(model)
    optimizer = gam_fast.GAM(compiled.parameters(), torch.optim.SGD, lr=0.0, rho=1e-3, rho_prime=1e-3, model=compiled)
    x = torch.randn(4, 6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        outputs = []
        for _ in range(2):
            for turn in optimizer.passes():
                out = compiled(x)
                turn.backward(out.square().mean())
                outputs.append(out.detach())
    for out in outputs[1:4]:
        torch.testing.assert_close(out, outputs[0], rtol=0.1, atol=0.1)
    assert not torch.allclose(outputs[4], outputs[0], rtol=0.1, atol=0.1)
    assert compiled_graphs() == 1


def test_a_step_that_is_left_is_undone_and_compiles_nothing():
    model, batches = make("batchnorm_cnn")
    compiled = torch.compile(model)
    optimizer = optimizer_of(compiled, "gam")
    optimizer.step(closure_of(compiled, *batches[0]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turn in optimizer.passes():
            turn.backward(loss_of(compiled, *batches[1]))
            if turn.index == 2:
                break
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        optimizer.step(closure_of(compiled, *batches[1]))
