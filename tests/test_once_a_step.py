"""The body runs once a pass: what belongs behind the loop is noticed in it, where it can be."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import METHODS
from torch import nn

import gam_fast


def optimizer_of(method_name, **options):
    method = METHODS[method_name]
    weight = nn.Parameter(torch.ones(3))
    return weight, method.optimizer([weight], torch.optim.SGD, lr=0.1, momentum=0.9, **method.hyper, **options)


@pytest.mark.parametrize("form", ["passes", "closure"])
@pytest.mark.parametrize("method_name", METHODS)
def test_state_dict_is_refused_in_a_pass_whose_weights_are_perturbed(method_name, form):
    weight, optimizer = optimizer_of(method_name)
    taken = []

    def body():
        (weight**2).sum().backward()
        try:
            taken.append(optimizer.state_dict())
        except RuntimeError as error:
            assert "save both behind the loop over passes" in str(error)  # noqa: PT017
            taken.append(None)

    for _ in range(2):
        taken.clear()
        before = optimizer.state_dict()
        if form == "closure":
            optimizer.step(body)
        else:
            for _ in optimizer.passes():
                body()
        assert taken == [before] + [None] * (METHODS[method_name].passes - 1)
    assert optimizer.state_dict()["state"]  # behind the loop it is there


@pytest.mark.parametrize("method_name", METHODS)
def test_hooks_around_the_update_may_take_a_checkpoint(method_name):
    weight, optimizer = optimizer_of(method_name)
    taken = []
    optimizer.register_step_pre_hook(lambda *_: taken.append((optimizer.state_dict(), weight.tolist())))
    optimizer.register_step_post_hook(lambda *_: taken.append((optimizer.state_dict(), weight.tolist())))
    before = weight.tolist()
    for _ in optimizer.passes():
        (weight**2).sum().backward()
    assert [weights for _, weights in taken] == [before, weight.tolist()]


def test_after_an_undone_step_a_checkpoint_can_be_taken():
    weight, optimizer = optimizer_of("gam")
    with pytest.raises(KeyError):  # noqa: PT012
        for turn in optimizer.passes():
            (weight**2).sum().backward()
            if turn.last:
                raise KeyError
    optimizer.state_dict()


@pytest.mark.parametrize("form", ["passes", "closure", "step"])
@pytest.mark.parametrize("method_name", [name for name in METHODS if METHODS[name].passes > 1])
def test_a_scheduler_that_steps_in_the_body_is_warned_of(method_name, form):
    weight, optimizer = optimizer_of(method_name)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def body():
        (weight**2).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the first step
            scheduler.step()

    def step():
        if form == "closure":
            optimizer.step(body)
            return
        for turn in optimizer.passes():
            body()
            if form == "step" and turn.last:
                optimizer.step()

    with pytest.warns(UserWarning, match="learning rate was changed between the passes .* belongs behind the loop"):
        step()


@pytest.mark.parametrize("method_name", METHODS)
def test_a_rate_that_the_body_sets_anew_in_each_step_is_no_reason_to_warn(method_name):
    """As in nanoGPT, where each iteration puts its rate into the groups first."""
    weight, optimizer = optimizer_of(method_name)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for i in range(3):
        for _ in optimizer.passes():
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (i + 1)
            (weight**2).sum().backward()
        scheduler.step()


def test_a_rate_that_is_a_tensor_is_left_alone():
    weight = nn.Parameter(torch.ones(3))
    optimizer = gam_fast.SAM([weight], torch.optim.Adam, lr=torch.tensor(0.1))
    for _ in optimizer.passes():
        (weight**2).sum().backward()
