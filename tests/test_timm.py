"""timm, the real package: its optimizer factory makes these optimizers, around every base it knows."""

from __future__ import annotations

from functools import partial

import pytest
import timm.optim
import timm_factory
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

import gam_fast
from gam_fast.integrations import register_timm

METHODS = [
    gam_fast.GAM,
    gam_fast.SAM,
    gam_fast.ASAM,
    gam_fast.GSAM,
    gam_fast.GradientNormPenalty,
    gam_fast.ExactGAM,
    gam_fast.CFlat,
    gam_fast.FAD,
    gam_fast.Base,
]


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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("base", "made"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("lamb", "Lamb")])
def test_every_method_around_a_base(method, base, made):
    model = net()
    radius = {"rho": 0.07} if "rho" in method.recipe.defaults else {}
    optimizer = create_optimizer_v2(model, f"{method.__name__.lower()}{base}", lr=1e-3, **radius)
    assert optimizer.model is model
    assert type(optimizer) is method
    assert type(optimizer.base) is (getattr(timm.optim, made) if isinstance(made, str) else made)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, optimizer)
    assert not any(torch.equal(p, q) for p, q in zip(before[:1], model.parameters(), strict=False))
    assert all(optimizer.param_groups[0][optimizer.key(name)] == value for name, value in radius.items())
    assert int(model[1].num_batches_tracked) == 1


def test_one_line_serves_every_name():
    """A script with ``--opt``: timm's own optimizers do not get ``model=``, ours find it."""
    for name in ("sgd", "adamw", "lamb", "lookahead_sgd", "basesgd", "samadamw", "lookahead_gamsgd"):
        for hand_over in (True, False):
            model = net()
            optimizer = create_optimizer_v2(model, name, lr=0.1, **({"model": model} if hand_over else {}))
            inner = getattr(optimizer, "_base_optimizer", optimizer)  # of Lookahead
            assert isinstance(inner, gam_fast.SharpnessAwareOptimizer) == name.endswith(
                ("basesgd", "samadamw", "gamsgd")
            )
            if isinstance(inner, gam_fast.SharpnessAwareOptimizer):
                assert inner.model is model
    wrapped = nn.DataParallel(net())
    assert create_optimizer_v2(wrapped.module, "gamsgd", lr=0.1, model=wrapped).model is wrapped
    assert create_optimizer_v2(net().parameters(), "gamsgd", lr=0.1).model is None
    with pytest.raises(ValueError, match="not found"):
        create_optimizer_v2(net(), "gamnosuch")


def test_the_base_alone_takes_the_steps_of_timms_own():
    ours, theirs = net(), net()
    base = create_optimizer_v2(ours, "basesgd", lr=0.1, momentum=0.8, weight_decay=0.05)
    plain = create_optimizer_v2(theirs, "sgd", lr=0.1, momentum=0.8, weight_decay=0.05)
    for _ in range(3):
        step(ours, base)
        plain.zero_grad()
        theirs(torch.ones(5, 4).cumsum(0)).square().mean().backward()
        plain.step()
    for p, q in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)


def test_timms_own_arguments_are_those_of_the_base():
    optimizer = create_optimizer_v2(net(), "gamsgd", lr=0.1, momentum=0.8, weight_decay=0.05)
    plain = create_optimizer_v2(net(), "sgd", lr=0.1, momentum=0.8, weight_decay=0.05)
    for ours, theirs in zip(optimizer.param_groups, plain.param_groups, strict=True):
        for key in set(theirs) - {"params"}:
            assert ours[key] == theirs[key], key
        assert len(ours["params"]) == len(theirs["params"])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert optimizer.param_groups[0]["nesterov"] is True


def test_it_steps_as_one_that_is_constructed():
    ours, theirs = net(), net()
    made = create_optimizer_v2(ours, "gamadamw", lr=0.01, weight_decay=0.0, betas=(0.8, 0.9), rho=0.1, model=ours)
    by_hand = gam_fast.GAM(
        theirs.parameters(), torch.optim.AdamW, lr=0.01, weight_decay=0.0, betas=(0.8, 0.9), rho=0.1, model=theirs
    )
    for _ in range(3):
        step(ours, made)
        step(theirs, by_hand)
    for p, q in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def usable():
    """The bases that can be made here: not those whose package or device is missing."""
    names = []
    for name in list_optimizers():
        if name.startswith(("bnb", "fused")) or isinstance(timm.optim.get_optimizer_info(name).opt_class, partial):
            continue
        if not timm.optim.get_optimizer_info(name).second_order:
            names.append(name)
    return names


def test_every_base_has_timms_defaults():
    names = usable()
    assert len(names) > 50
    for name in names:
        model = net()
        plain = create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.01)
        ours = create_optimizer_v2(model, f"gam{name}", lr=1e-3, weight_decay=0.01, alpha=0.35)
        for group, other in zip(ours.base.param_groups, plain.param_groups, strict=True):
            for key in set(other) - {"params"}:
                assert group[key] == other[key], (name, key)
            assert group[ours.key("alpha")] == 0.35


def test_layer_decay_scales_the_groups():
    model = timm.create_model("resnet10t", num_classes=3, in_chans=1)
    optimizer = create_optimizer_v2(model, "samadamw", lr=0.01, layer_decay=0.5, weight_decay=0.05, model=model)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2


def test_names_are_listed_and_added_once():
    assert {"gamsgd", "samadamw", "gsamlamb"} <= set(list_optimizers())
    before = list_optimizers()
    assert register_timm() == []
    assert list_optimizers() == before
    assert not [name for name in before if name.startswith(("gamgam", "gamadahessian", "samgam"))]


def test_the_example_learns():
    losses = timm_factory.main(steps=12, size=300)
    assert losses[-1] < 0.8 * losses[0]
