"""An instance as base that was wrapped before: what counts of the values its groups hold."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import METHODS, in_turn
from snapshots import COPIES
from torch import nn

import gam_fast
from gam_fast.active import STEPS

NAMES = list(METHODS)


def instance(**values):
    """Two groups; ``values`` are set in the second, by the user."""
    groups = [{"params": [nn.Parameter(torch.ones(3))]}, {"params": [nn.Parameter(torch.ones(2))], **values}]
    return torch.optim.SGD(groups, lr=0.1)


def values_of(optimizer, name="rho"):
    return [group[optimizer.key(name)] for group in optimizer.param_groups]


def step(optimizer):
    optimizer.step(lambda: sum(p.square().sum() for g in optimizer.param_groups for p in g["params"]).backward())


@pytest.mark.parametrize(("before", "method_name"), [*in_turn(NAMES, NAMES[1:]), *in_turn(NAMES, NAMES[3:])])
def test_a_second_wrapper_has_its_own_values_whatever_the_first_left(before, method_name):
    base, fresh = instance(), instance()
    step(METHODS[before].optimizer(None, base, interval=2, **METHODS[before].hyper))
    for values in (METHODS[method_name].hyper, {}):
        optimizer = METHODS[method_name].optimizer(None, base, **values)
        expected = METHODS[method_name].optimizer(None, copy.deepcopy(fresh), **values)
        for mine, its in zip(optimizer.param_groups, expected.param_groups, strict=True):
            assert {k: v for k, v in mine.items() if k != "params"} == {k: v for k, v in its.items() if k != "params"}
        step(optimizer)


def test_explicit_values_and_defaults_win_over_those_of_the_wrapper_before():
    base = instance()
    first = gam_fast.SAM(None, base, rho=0.05)
    gam_fast.schedules.ConstantRadius(first)
    first.param_groups[1]["rho"] = 0.7  # of that wrapper
    assert values_of(gam_fast.SAM(None, base, rho=0.5)) == [0.5, 0.5]
    assert values_of(gam_fast.SAM(None, base)) == [0.05, 0.05]
    assert values_of(gam_fast.GAM(None, base, rho=0.3)) == [0.3, 0.3]
    assert values_of(gam_fast.GAM(None, base)) == [0.2, 0.2]
    step(first)  # goes on, by what there is


def test_what_the_user_has_set_in_a_group_stays():
    base = instance(rho=0.0)
    for rho in (0.05, 0.5):
        assert values_of(gam_fast.SAM(None, base, rho=rho)) == [rho, 0.0]
    assert values_of(gam_fast.GAM(None, base)) == [0.2, 0.0]
    different = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "rho": rho} for rho in (0.1, 0.3)])
    assert values_of(gam_fast.SAM(None, different, rho=0.5)) == [0.1, 0.3]
    alone = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "rho": 0.3}])
    assert values_of(gam_fast.SAM(None, alone)) == [0.3]
    assert values_of(gam_fast.SAM(None, alone, rho=0.5)) == [0.5]  # would be in vain otherwise
    classes = gam_fast.SAM([{"params": [nn.Parameter(torch.ones(2))], "rho": 0.3}], torch.optim.SGD, rho=0.5)
    assert values_of(classes) == [0.3]


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_copy_is_known_to_have_been_wrapped(how):
    twin = how(gam_fast.SAM(None, instance(rho=0.0), rho=0.05))
    assert values_of(twin) == [0.05, 0.0]
    assert values_of(gam_fast.SAM(None, twin.base, rho=0.5)) == [0.5, 0.0]
    base = instance()
    gam_fast.SAM(None, base, rho=0.07)
    assert values_of(gam_fast.SAM(None, how(base), rho=0.5)) == [0.5, 0.5]  # of the base alone, by what is explicit
    assert values_of(gam_fast.SAM(None, how(base))) == [0.07, 0.07]
    assert values_of(gam_fast.SAM(None, how(base), rho=0.05)) == [0.05, 0.05]  # explicit, though it is the default


def test_a_state_that_was_loaded_belongs_to_its_wrapper():
    saved = gam_fast.SAM(None, instance(), rho=0.1).state_dict()
    base = instance()
    optimizer = gam_fast.SAM(None, base, rho=0.05)
    optimizer.load_state_dict(saved)
    assert values_of(optimizer) == [0.1, 0.1]
    assert values_of(gam_fast.SAM(None, base, rho=0.5)) == [0.5, 0.5]
    other = instance()
    other.load_state_dict(saved)  # never wrapped: the checkpoint's values
    assert values_of(gam_fast.SAM(None, other)) == [0.1, 0.1]
    assert "_gam_fast_filled" not in str(optimizer.state_dict())


def test_counters_begin_anew():
    base = instance()
    first = gam_fast.GAM(None, base, interval=3)
    step(first)
    assert base.param_groups[0][STEPS] == 1
    second = gam_fast.SAM(None, base, interval=2)
    assert base.param_groups[0][STEPS] == 0
    step(second)
    assert [group[STEPS] for group in base.param_groups] == [1, 1]
    gam_fast.SAM(None, base)
    assert STEPS not in base.param_groups[0]
    step(second)


def test_a_wrapper_that_is_refused_leaves_the_one_before_alone():
    base = instance()
    first = gam_fast.ExactGAM(None, base, sam_rho=0.1)
    before = [dict(group) for group in base.param_groups]
    with pytest.raises(ValueError, match="rho must not be negative"):
        gam_fast.SAM(None, base, rho=-1.0)
    with pytest.raises(ValueError, match="rho must be finite"):
        gam_fast.SAM(None, base, rho=math.inf)
    assert base.param_groups == before
    assert values_of(first, "sam_rho") == [0.1, 0.1]
    gam_fast.ExactGAM(None, base)  # without the pass of SAM: that key has gone
    assert "sam_rho" not in base.param_groups[0]


def test_members_of_a_chain_remember_too():
    a, b = (torch.optim.SGD([nn.Parameter(torch.ones(2))]) for _ in range(2))
    gam_fast.SAM(None, a, rho=0.1)
    assert values_of(gam_fast.SAM(None, [a, b], rho=0.3)) == [0.3, 0.3]
    assert values_of(gam_fast.SAM(None, [a, b])) == [0.05, 0.05]
    assert values_of(gam_fast.GAM(None, b, rho=0.4)) == [0.4]
