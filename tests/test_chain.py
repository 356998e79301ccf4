"""Several base optimizers in one step: one perturbation by one norm, each base its own update, one state."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from cases import ALL, FORMS, METHODS, closure_of, in_turn, loss_of, make, take_step
from pytorch_optimizer import Lookahead
from snapshots import COPIES, assert_close, through_a_file, unchanged
from test_trajectories import reference_step
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gam_fast

MUON = partial(getattr(torch.optim, "Muon", torch.optim.Adamax), lr=0.02)  # which torch has from 2.9 on
PAIRS = {
    "muon+adamw": (MUON, partial(torch.optim.AdamW, lr=1e-2, eps=1e-4)),
    "sgd+adam": (partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.Adam, lr=1e-2, eps=1e-4)),
    "sgd+sgd": (partial(torch.optim.SGD, lr=0.1, weight_decay=0.1), partial(torch.optim.SGD, lr=0.05, momentum=0.5)),
    "rmsprop+radam": (partial(torch.optim.RMSprop, lr=1e-3, eps=1e-4), partial(torch.optim.RAdam, lr=1e-3)),
}


def members_of(model, pair):
    """One for the matrices, in two groups of different rates, one for the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, rest = ([p for p in trained if (p.dim() == 2) is flag] for flag in (True, False))
    first, second = PAIRS[pair]
    return [first([{"params": matrices[:1]}, {"params": matrices[1:], "lr": 0.01}]), second(rest)]


class OneAfterTheOther:
    """Plain optimizers, for the loop by the book."""

    def __init__(self, members):
        self.members = members
        self.param_groups = [group for member in members for group in member.param_groups]

    def step(self):
        for member in self.members:
            member.step()


def made(method_name="gam", pair="muon+adamw", model_name="mlp", **options):
    method = ALL[method_name]
    model, batches = make(model_name)
    optimizer = method.optimizer(None, members_of(model, pair), model=model, **method.hyper, **options)
    return model, optimizer, batches


ROWS = in_turn(METHODS, PAIRS)
ROWS += [row for row in in_turn(["gam"], PAIRS) if row not in ROWS]


@pytest.mark.parametrize(("method_name", "pair"), ROWS)
def test_the_trajectory_is_that_of_the_plain_loop(method_name, pair):
    """The reference has one norm over all parameters."""
    model, optimizer, batches = made(method_name, pair)
    twin = copy.deepcopy(model)
    plain = OneAfterTheOther(members_of(twin, pair))
    for k, (x, y) in enumerate(batches):
        take_step(optimizer, closure_of(model, x, y), FORMS[k % 2])
        reference_step(twin, plain, ALL[method_name], ALL[method_name].hyper, x, y)
    assert_close(model, twin, rtol=1e-8, atol=1e-9)  # Muon iterates in bfloat16


@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_without_a_radius_it_is_each_of_them_alone_bit_for_bit(method_name):
    radii = {name: 0.0 for name in ALL[method_name].hyper if name.startswith(("rho", "gamma"))}
    for pair in PAIRS:
        model, batches = make("mlp", torch.float32)
        twin = copy.deepcopy(model)
        optimizer = ALL[method_name].optimizer(None, members_of(model, pair), **radii)
        alone = [gam_fast.Base(None, member) for member in members_of(twin, pair)]
        plain = pair == "rmsprop+radam"  # which the engine leaves to torch
        for x, y in batches:
            optimizer.step(closure_of(model, x, y))
            for each in alone:
                each.zero_grad()
            loss_of(twin, x, y).backward()
            for each in alone:
                (each.base if plain else each).step()
        if method_name == "base":
            assert_close(model, twin)
        else:  # 0.6 g + 0.4 g is off by an ulp
            assert_close(model, twin, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_parameters_without_a_gradient_are_left_alone_and_clipping_is_by_the_norm_over_all(pair):
    model, optimizer, batches = made("gam", pair, "partly_used", clip_grad_norm=0.05)
    twin = copy.deepcopy(model)
    plain = OneAfterTheOther(members_of(twin, pair))
    take = plain.step
    plain.step = lambda: (nn.utils.clip_grad_norm_(twin.parameters(), 0.05), take())
    for x, y in batches[:2]:
        optimizer.step(closure_of(model, x, y))
        reference_step(twin, plain, METHODS["gam"], METHODS["gam"].hyper, x, y)
    assert_close(model, twin, rtol=1e-6, atol=1e-7)
    assert model.unused.weight not in optimizer.state


@pytest.mark.parametrize("pair", PAIRS)
def test_one_state_dict_resumes_all_of_them(pair):
    model, optimizer, batches = made("gam", pair)
    optimizer.step(closure_of(model, *batches[0]))
    saved = through_a_file(optimizer.state_dict())
    first, second = optimizer.base.members
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1, 2], [3, 4, 5]]
    assert sizes == [1, 2, 3]
    assert saved.keys() == {"state", "param_groups"}
    for number, param in enumerate([p for group in optimizer.param_groups for p in group["params"]]):
        assert saved["state"].get(number, {}).keys() == optimizer.state.get(param, {}).keys()
    other, resumed, _ = made("gam", pair)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for x, y in batches[1:]:
        optimizer.step(closure_of(model, x, y))
        resumed.step(closure_of(other, x, y))
    assert_close(model, other)
    # each part is that of one member
    fresh = members_of(make("mlp")[0], pair)
    for mine, its in zip((first, second), fresh, strict=True):
        its.load_state_dict(mine.state_dict())
    assert [g["rho"] for member in fresh for g in member.param_groups] == [0.2] * 3


@pytest.mark.parametrize("first", [True, False])
def test_a_member_with_a_nested_state_resumes_too(first):
    def build():
        model, batches = make("mlp")
        params = list(model.parameters())
        wrapped = Lookahead(torch.optim.SGD(params[:3], lr=0.1, momentum=0.9))
        members = [wrapped, torch.optim.Adam(params[3:], lr=1e-2)]
        return model, gam_fast.SAM(None, members if first else members[::-1], rho=0.1), batches

    model, optimizer, batches = build()
    for x, y in batches[:2]:
        optimizer.step(closure_of(model, x, y))
    resumed, other, _ = build()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for x, y in batches[2:]:
        optimizer.step(closure_of(model, x, y))
        other.step(closure_of(resumed, x, y))
    assert_close(model, resumed)


def test_a_state_that_does_not_fit_changes_nothing():
    model, optimizer, batches = made("gam", "sgd+adam")
    optimizer.step(closure_of(model, *batches[0]))
    groups = optimizer.state_dict()["param_groups"][::-1]
    for part, message in (
        (groups, "3 parameters where this optimizer has one of 1: a list of base optimizers"),
        (groups[:2], r"2 parameter groups for base optimizers that have 2 \+ 1"),
    ):
        with unchanged(model, optimizer), pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({**optimizer.state_dict(), "param_groups": part})


def test_groups_and_rates_are_shared_with_the_members():
    model, optimizer, batches = made()
    muon, adamw = optimizer.base.members

    def check():
        assert [id(g) for g in optimizer.param_groups] == [id(g) for g in (*muon.param_groups, *adamw.param_groups)]

    check()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    own = torch.optim.lr_scheduler.ConstantLR(adamw, factor=1.0)
    radius = gam_fast.schedules.LinearRadius(optimizer, "rho", total_steps=4, end=0.1)
    rates = [group["lr"] for group in optimizer.param_groups]
    for _ in range(2):
        optimizer.step(closure_of(model, *batches[0]))
        scheduler.step()
        own.step()
        radius.step()
    assert [g["lr"] for g in muon.param_groups] == [0.25 * rate for rate in rates[:2]]
    assert [g["lr"] for g in adamw.param_groups] == [0.25 * rate for rate in rates[2:]]
    assert len({g["rho"] for g in optimizer.param_groups}) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    check()
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert repr(optimizer).startswith(f"GAM (base: {type(muon).__name__} + AdamW, backend")
    assert set(optimizer.state) == set(model.parameters())
    assert len(optimizer.state) == 6
    optimizer.state.clear()
    assert not muon.state
    assert not adamw.state


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_copies_go_on_alike(how):
    model, optimizer, batches = made("gam", "sgd+adam")
    optimizer.step(closure_of(model, *batches[0]))
    twin, other = how((model, optimizer))
    optimizer.step(closure_of(model, *batches[1]))
    other.step(closure_of(twin, *batches[1]))
    assert_close(model, twin)
    assert other.param_groups[0] is other.base.members[0].param_groups[0]


def test_groups_are_added_to_a_member():
    model, optimizer, batches = made("gam", "sgd+adam")
    new, both = nn.Parameter(torch.ones(2)), next(model.parameters())
    with pytest.raises(RuntimeError, match=r"add_param_group.*\(0: SGD, 1: Adam\)"):
        optimizer.add_param_group({"params": [new]})
    optimizer.base.members[1].add_param_group({"params": [new], "lr": 0.5})

    def closure():
        loss = loss_of(model, *batches[0]) + new.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.param_groups[-1]["params"] == [new]
    assert not torch.equal(new, torch.ones(2))
    optimizer.base.members[1].add_param_group({"params": [both]})
    with pytest.raises(ValueError, match=r"belongs to several base optimizers \(SGD, Adam\)"):
        optimizer.step(closure)


def test_hooks_of_members_run_around_their_update_and_those_of_all_once():
    model, optimizer, batches = made("sam", "sgd+adam")
    calls = []
    for i, member in enumerate(optimizer.base.members):
        member.register_step_pre_hook(lambda *_, i=i: calls.append(f"before {i}"))
        member.register_step_post_hook(lambda *_, i=i: calls.append(f"after {i}"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    handle = register_optimizer_step_pre_hook(lambda opt, *_: calls.append(type(opt).__name__))
    optimizer.step(closure_of(model, *batches[0]))
    handle.remove()
    assert calls == ["SAM", "before", "before 0", "after 0", "before 1", "after 1", "after"]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_hook_sees_and_changes_the_direction_of_all_also_under_a_scaler(pair):
    model, optimizer, batches = made("gam", pair)
    twin = copy.deepcopy(model)
    plain = OneAfterTheOther(members_of(twin, pair))

    def clamp(opt, args, kwargs):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad.clamp_(-0.01, 0.01)

    for each in (optimizer, *plain.members):
        each.register_step_pre_hook(clamp)
    for scaler, (x, y) in zip((None, torch.amp.GradScaler("cpu", init_scale=1024.0)), batches, strict=False):
        for turn in optimizer.passes(scaler=scaler):
            turn.backward(loss_of(model, x, y))
        reference_step(twin, plain, METHODS["gam"], METHODS["gam"].hyper, x, y)
    assert_close(model, twin, rtol=1e-8, atol=1e-9)


def test_an_error_in_one_of_them_restores_the_parameters_of_all():
    model, optimizer, batches = made("sam", "sgd+adam")
    before = copy.deepcopy(model)

    def fail(*_):
        raise KeyError("second")

    optimizer.base.members[1].register_step_pre_hook(fail)
    with pytest.raises(KeyError, match="second"):
        optimizer.step(closure_of(model, *batches[0]))
    assert_close(model, before)


def test_a_hyper_parameter_of_any_member_keeps_its_name():
    model, _ = make("mlp")
    matrices, rest = ([p for p in model.parameters() if (p.dim() == 2) is flag] for flag in (True, False))
    optimizer = gam_fast.GAM(None, [torch.optim.SGD(matrices), torch.optim.RMSprop(rest, alpha=0.9)], alpha=0.25)
    assert optimizer.key("alpha") == "gam_alpha"
    assert [group["gam_alpha"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert "alpha" not in optimizer.param_groups[0]
    assert optimizer.param_groups[1]["alpha"] == 0.9


def test_params_are_none_or_all_of_theirs():
    model, _ = make("mlp")
    members = members_of(model, "sgd+adam")
    assert len(gam_fast.SAM(model.parameters(), members).param_groups) == 3
    with pytest.raises(ValueError, match="over other parameters than params"):
        gam_fast.SAM(list(model.parameters())[1:], members)
    alone = torch.optim.SGD(model.parameters())
    assert gam_fast.SAM(None, [alone]).base is alone


class Wrapping(torch.optim.Optimizer):
    """Does without the constructor of its parent, as torch's PostLocalSGDOptimizer."""

    def __init__(self, optimizer):
        self.optim, self.param_groups = optimizer, optimizer.param_groups

    def step(self):
        self.optim.step()


class NeedsAClosure(torch.optim.SGD):
    def step(self, closure):
        return closure()


def test_misuse_is_refused_in_words():
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([weight])
    named = torch.optim.AdamW([("bias", weight), ("scale", other)])
    for members, error, message in (
        ([sgd, named], ValueError, r"parameter 0 of group 0, of shape \(2,\), belongs to several base .*SGD, AdamW"),
        ([named, sgd], ValueError, r"parameter 0 of group 0 \(bias\), of shape"),
        ([sgd, sgd], ValueError, "belongs to several"),
        ([], ValueError, "at least one"),
        ([sgd, torch.optim.AdamW], TypeError, r"instances of torch optimizers, got <class.*Muon\(matrices, lr=0.02\)"),
        ([sgd, gam_fast.SAM([other])], TypeError, "not one of gam_fast"),
        ([sgd, torch.optim.LBFGS([other])], TypeError, "LBFGS cannot be the base optimizer"),
        ([Wrapping(sgd)], TypeError, "Wrapping cannot be .*PostLocalSGDOptimizer does, pass that one"),
        ([NeedsAClosure([other])], TypeError, "NeedsAClosure cannot be .*, because it evaluates its own closure"),
    ):
        with pytest.raises(error, match=message):
            gam_fast.GAM(None, members)
    with pytest.raises(TypeError, match="unexpected arguments lr"):
        gam_fast.GAM(None, [sgd, torch.optim.SGD([other])], lr=0.1)
