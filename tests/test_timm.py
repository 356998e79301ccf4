"""timm, the real package: its optimizer factory makes these optimizers, around every base it knows."""

from functools import partial

import cases
import pytest
import timm.optim
import timm_factory
import torch
from snapshots import assert_equal
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

import gam_fast
from gam_fast.integrations import register_timm

METHODS = [*dict.fromkeys(case.optimizer for case in cases.METHODS.values()), gam_fast.ExactGAM]
BASES = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "lamb": timm.optim.Lamb}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_timm()


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))


def step(model, optimizer):
    x = torch.ones(5, 4).cumsum(0)
    for turn in optimizer.passes():
        turn.backward(model(x).square().mean())


@pytest.mark.parametrize(("method", "base"), [(method, [*BASES][i % 3]) for i, method in enumerate(METHODS)])
def test_every_method_around_a_base(method, base):
    model = net()
    radius = {"rho": 0.07} if "rho" in method.recipe.defaults else {}
    optimizer = create_optimizer_v2(model, f"{method.__name__.lower()}{base}", lr=1e-3, **radius)
    assert optimizer.model is model
    assert type(optimizer) is method
    assert type(optimizer.base) is BASES[base]
    before = model[0].weight.detach().clone()
    step(model, optimizer)
    assert not torch.equal(model[0].weight, before)
    assert all(optimizer.param_groups[0][optimizer.key(name)] == value for name, value in radius.items())
    assert int(model[1].num_batches_tracked) == 1


def test_one_line_serves_every_name():
    """A script with ``--opt``: timm's own optimizers do not get ``model=``, ours find it."""
    ours = ("basesgd", "samadamw", "lookahead_gamsgd")
    for name in ("sgd", "lamb", "lookahead_sgd", *ours):
        for hand_over in (True, False):
            model = net()
            optimizer = create_optimizer_v2(model, name, lr=0.1, **({"model": model} if hand_over else {}))
            inner = getattr(optimizer, "_base_optimizer", optimizer)  # of Lookahead
            assert isinstance(inner, gam_fast.SharpnessAwareOptimizer) == (name in ours)
            assert name not in ours or inner.model is model
    wrapped = nn.DataParallel(net())
    assert create_optimizer_v2(wrapped.module, "gamsgd", lr=0.1, model=wrapped).model is wrapped
    assert create_optimizer_v2(net().parameters(), "gamsgd", lr=0.1).model is None
    with pytest.raises(ValueError, match="not found"):
        create_optimizer_v2(net(), "gamnosuch")


def test_it_steps_as_one_that_is_constructed():
    ours, theirs = net(), net()
    options = {"lr": 0.01, "weight_decay": 0.0, "betas": (0.8, 0.9), "rho": 0.1}
    made = create_optimizer_v2(ours, "gamadamw", **options)
    by_hand = gam_fast.GAM(theirs.parameters(), torch.optim.AdamW, model=theirs, **options)
    for _ in range(3):
        step(ours, made)
        step(theirs, by_hand)
    assert_equal(ours, theirs)


def test_every_base_has_timms_defaults_and_arguments():
    names = []
    for name in list_optimizers():
        info = get_optimizer_info(name)
        # neither ours, nor those whose package or device is missing
        if not (name.startswith(("bnb", "fused")) or isinstance(info.opt_class, partial) or info.second_order):
            names.append(name)
    assert len(names) > 50
    for name in names:
        model = net()
        plain = create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.01)
        ours = create_optimizer_v2(model, f"gam{name}", lr=1e-3, weight_decay=0.01, alpha=0.35)
        for group, other in zip(ours.base.param_groups, plain.param_groups, strict=True):
            assert len(group["params"]) == len(other["params"])
            for key in set(other) - {"params"}:
                assert group[key] == other[key], (name, key)
            assert group[ours.key("alpha")] == 0.35
    optimizer = create_optimizer_v2(net(), "gamsgd", lr=0.1, weight_decay=0.05)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}


def test_layer_decay_scales_the_groups():
    model = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    optimizer = create_optimizer_v2(model, "samadamw", lr=0.01, layer_decay=0.5, weight_decay=0.05, model=model)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2


def test_names_are_listed_and_added_once():
    before = list_optimizers()
    assert {"gamsgd", "samadamw", "gsamlamb"} <= set(before)
    assert register_timm() == []
    assert list_optimizers() == before
    assert not [name for name in before if name.startswith(("gamgam", "gamadahessian", "samgam"))]


def test_the_example_learns():
    losses = timm_factory.main(steps=12, size=300)
    assert losses[-1] < 0.8 * losses[0]
