"""The optimizer as torch's users meet it: groups, state, hooks, schedulers, copies, and misuse."""

from __future__ import annotations

import copy
import dataclasses
import gc
import math
import pickle
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import BACKENDS, EXACT, METHODS, closure_of, in_turn, make
from snapshots import COPIES, assert_equal
from test_active import train
from torch import nn

import gam_fast


def parabola(*values, dtype=torch.float64):
    weight = nn.Parameter(torch.tensor(values or (3.0, 4.0), dtype=dtype))

    def closure():
        loss = (weight**2).sum()
        loss.backward()
        return loss

    return weight, closure


def over_parabola(method, base=torch.optim.SGD, **options):
    weight, closure = parabola()
    return weight, closure, method([weight], base, **options)


@pytest.mark.parametrize("method_name", METHODS)
def test_the_closure_is_called_once_a_pass_and_the_loss_is_that_at_theta(method_name):
    method = METHODS[method_name]
    weight, closure = parabola()
    losses, places = [], []

    def recording():
        losses.append(closure())
        return losses[-1]

    optimizer = method.optimizer([weight], torch.optim.SGD, lr=0.01, **method.hyper)
    returned = optimizer.step(recording)
    assert len(losses) == method.passes
    assert returned is losses[0]
    assert returned.item() == 25.0
    for turn in optimizer.passes():
        places.append((turn.index, turn.passes, turn.last))
        closure()
    assert places == [(i, method.passes, i == method.passes - 1) for i in range(method.passes)]


def test_grad_is_that_of_the_last_pass_after_a_step():
    for base in (torch.optim.SGD, torch.optim.RMSprop):
        weight, closure, optimizer = over_parabola(gam_fast.SAM, base, lr=0.01, rho=5.0)
        optimizer.step(closure)
        torch.testing.assert_close(weight.grad, torch.tensor([12.0, 16.0], dtype=torch.float64))


def test_gradients_from_before_a_step_do_not_count():
    weight, closure, optimizer = over_parabola(gam_fast.SAM, lr=0.5, rho=0.0)
    closure()
    optimizer.step(closure)
    assert torch.equal(weight, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("method", [gam_fast.Base, gam_fast.SAM])
def test_gradients_that_somebody_made_between_steps_are_warned_of(method):
    _, closure, optimizer = over_parabola(method, lr=0.1)
    for clear in (lambda: None, optimizer.zero_grad):  # what a step leaves behind is nobody's loss
        optimizer.step(closure)
        clear()
        optimizer.step(closure)
    message = rf"there before this step of {method.__name__} are not used.*micro_batches\(\).*zero_grad"
    for by_loop in (True, False):
        optimizer.zero_grad()
        closure()
        with pytest.warns(UserWarning, match=message) as caught:
            [closure() for _ in optimizer.passes()] if by_loop else optimizer.step(closure)
        assert caught[0].filename == __file__


def test_step_runs_under_no_grad_and_leaves_grad_mode_alone():
    weight, closure, optimizer = over_parabola(gam_fast.GAM, lr=0.01)
    with torch.no_grad():
        optimizer.step(closure)
        assert not torch.is_grad_enabled()
    loop = optimizer.passes()
    next(loop)
    with torch.no_grad():
        loop.close()
        assert not torch.is_grad_enabled()
    for _ in optimizer.passes():
        assert torch.is_grad_enabled()
        closure()
    assert weight.requires_grad
    assert weight.is_leaf


# Parameter groups and what is shared with the base


def test_groups_and_state_are_the_base_optimizers_for_good():
    weight, closure, optimizer = over_parabola(gam_fast.GAM, lr=0.1, momentum=0.9)
    optimizer.step(closure)
    assert optimizer.param_groups is optimizer.base.param_groups
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    optimizer.param_groups[0]["lr"] = 0.0
    before = weight.detach().clone()
    optimizer.step(closure)
    assert torch.equal(weight, before)


def test_a_group_has_its_own_values_or_those_of_the_constructor():
    weight, closure = parabola()
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = gam_fast.GAM([{"params": [weight], "rho": 0.7, "beta": (1.0, 0.2)}], lr=0.1, alpha=0.25)
    optimizer.step(closure)
    optimizer.add_param_group({"params": [extra]})
    values = [(group["rho"], group["beta"], group["alpha"]) for group in optimizer.param_groups]
    assert values == [(0.7, (1.0, 0.2), 0.25), (0.2, 0.5, 0.25)]
    optimizer.step(lambda: ((weight**2).sum() + (extra**2).sum()).backward())
    assert not torch.equal(extra, torch.ones(2, dtype=torch.float64))
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group([extra])
    with pytest.raises(ValueError, match="rho must not be negative, got -1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("make", [float, np.float64, np.float32, torch.tensor])
def test_a_value_written_into_a_group_is_checked_whatever_its_type(make):
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], lr=0.1)
    start = weight.detach().clone()
    for wrong, message in ((-0.5, "rho must not be negative, got .*-0.5"), (math.nan, "rho must be finite, got .*nan")):
        optimizer.param_groups[0]["rho"] = make(wrong)
        with pytest.raises(ValueError, match=message):
            optimizer.step(closure)
    assert torch.equal(weight, start)
    optimizer.param_groups[0]["rho"] = make(0.5)
    optimizer.step(closure)
    assert not torch.equal(weight, start)


def test_a_name_the_base_uses_too_gets_the_recipes_name_in_front():
    weight, closure = parabola()
    optimizer = gam_fast.GAM(None, torch.optim.RMSprop([weight], lr=0.01, alpha=0.9), alpha=0.25)
    group = optimizer.param_groups[0]
    assert (group["alpha"], group["gam_alpha"]) == (0.9, 0.25)
    assert (optimizer.key("alpha"), optimizer.key("rho")) == ("gam_alpha", "rho")
    optimizer.step(closure)
    other = gam_fast.GAM([weight], torch.optim.RMSprop, lr=0.01, alpha=0.25)
    assert other.param_groups[0]["alpha"] == 0.99
    with pytest.raises(ValueError, match="GAM has no hyper-parameter 'sigma'; it has rho, rho_prime"):
        optimizer.key("sigma")


# State dicts, copies, hooks, schedulers


def test_loading_what_does_not_fit_changes_nothing():
    weight, closure, optimizer = over_parabola(gam_fast.SAM, lr=0.1, momentum=0.9, rho=0.3)
    optimizer.step(closure)
    good = optimizer.state_dict()
    bad = copy.deepcopy(good)
    bad["param_groups"][0]["rho"] = float("nan")
    with pytest.raises(ValueError, match="rho must be finite, got nan"):
        optimizer.load_state_dict(bad)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": good["param_groups"] * 2})
    assert optimizer.param_groups[0]["rho"] == 0.3
    assert "momentum_buffer" in optimizer.state[weight]


def of_any_kind():
    """Parameters of three dtypes, of three orders in memory, and one with gaps."""
    generator = torch.Generator().manual_seed(5)
    wide = torch.randn(6, 8, generator=generator)
    image = torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last)
    values = [torch.randn(4, 5, generator=generator).T, image, torch.randn(7, generator=generator).double()]
    params = [nn.Parameter(value) for value in (*values, torch.randn(9, generator=generator).bfloat16())]
    params.append(nn.Parameter(torch.empty(0)))
    params[-1].data = wide[:, ::2]
    return params, wide


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_parameters_of_any_dtype_and_order_in_memory_share_one_step(base):
    found = []
    for backend in BACKENDS:
        params, wide = of_any_kind()
        beside = wide[:, 1::2].clone()
        optimizer = gam_fast.GAM(params, base, lr=0.01, backend=backend)
        for _ in range(3):
            optimizer.step(lambda params=params: sum((p.double() ** 3).sum() for p in params).backward())
        assert torch.equal(wide[:, 1::2], beside)
        found.append([param.detach().double() for param in params])
    for values in found[1:]:
        torch.testing.assert_close(values, found[0], rtol=0.0, atol=2.0**-8)
        torch.testing.assert_close(values[:3], found[0][:3], rtol=1e-5, atol=1e-6)


def test_state_of_another_order_in_memory_is_brought_to_that_of_its_parameter():
    """As a state is that was saved before the model became channels-last."""
    params, _ = of_any_kind()
    image = params[1]
    optimizer = gam_fast.GAM([image], torch.optim.AdamW, lr=0.01)
    twin = copy.deepcopy(optimizer)
    other = twin.param_groups[0]["params"][0]
    for each, param in ((optimizer, image), (twin, other)):
        each.step(lambda param=param: (param**3).sum().backward())
    state = optimizer.state[image]
    state["exp_avg"] = state["exp_avg"].contiguous()
    for each, param in ((optimizer, image), (twin, other)):
        each.step(lambda param=param: (param**3).sum().backward())
    assert torch.equal(image, other)
    assert state["exp_avg"].stride() == image.stride() or "native" not in BACKENDS
    assert torch.equal(state["exp_avg"], twin.state[other]["exp_avg"])


def test_an_optimizer_goes_with_the_last_reference_to_it():
    """Not when the garbage collector comes: its state may be all of a GPU's memory."""
    model, batches = make("mlp")
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model)
    for batch in batches[:2]:
        optimizer.step(closure_of(model, *batch))
    buffers = [weakref.ref(state["momentum_buffer"]) for state in optimizer.state.values()]
    gc.collect()
    gc.disable()
    try:
        del optimizer
        assert all(ref() is None for ref in buffers)
    finally:
        gc.enable()


@pytest.mark.parametrize(("method_name", "how", "first"), in_turn(METHODS | EXACT, COPIES, ["model", "optimizer"]))
def test_copies_go_on_alike(method_name, how, first):
    method = (METHODS | EXACT)[method_name]
    model, batches = make("batchnorm_cnn")
    options = {"lr": 0.1, "momentum": 0.9, "model": model, "clip_grad_norm": 5.0, **method.hyper}
    optimizer = method.optimizer(model.parameters(), torch.optim.SGD, **options)
    train(model, optimizer, batches[:1])
    if first == "model":
        twin_model, twin = COPIES[how]((model, optimizer))
    else:
        twin, twin_model = COPIES[how]((optimizer, model))
    assert repr(twin) == repr(optimizer)
    assert twin.model is twin_model
    assert copy.copy(optimizer).model is model
    train(model, optimizer, batches[1:])
    train(twin_model, twin, batches[1:])
    assert_equal(model, twin_model)


def test_a_scheduler_after_a_skipped_step_does_not_warn_that_there_was_none():
    weight, closure, optimizer = over_parabola(gam_fast.SAM, lr=1.0, on_nonfinite="skip")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step(lambda: (closure(), weight.grad.fill_(math.nan)))
    scheduler.step()
    assert optimizer.skipped_steps == 1


def test_repr_names_base_backend_and_hyper_parameters():
    weight, _ = parabola()
    text = repr(gam_fast.GAM([weight], torch.optim.AdamW, lr=0.1, rho=0.25, backend="eager"))
    assert text.startswith("GAM (base: AdamW, backend: eager\nParameter Group 0\n")
    assert "    rho: 0.25\n" in text
    assert text.endswith(")")


# Misuse


def test_arguments_are_checked():
    weight, _ = parabola()
    other, imaginary = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2, dtype=torch.complex64))
    sgd = torch.optim.SGD
    cases = [
        (ValueError, "rho must not be negative, got -0.1", lambda: gam_fast.GAM([weight], sgd, lr=0.1, rho=-0.1)),
        (ValueError, "rho_prime must be finite, got inf", lambda: gam_fast.GAM([weight], rho_prime=float("inf"))),
        (TypeError, "gamma must be a number, got '0.1'", lambda: gam_fast.GAM([weight], gamma="0.1")),
        (TypeError, "rho must be a number, got True", lambda: gam_fast.GAM([weight], rho=True)),
        (ValueError, r"alpha must be a number a, meaning", lambda: gam_fast.GAM([weight], alpha=(1.0, 2.0, 3.0))),
        (TypeError, "alpha must be a number or a pair", lambda: gam_fast.GAM([weight], alpha=None)),
        (TypeError, "must be a number, got", lambda: gam_fast.GSAM([weight], alpha=(0.5, 0.5))),
        (TypeError, "model must be one torch.nn.Module", lambda: gam_fast.GAM([weight], model="resnet")),
        (TypeError, r"ModuleList\(\[...\]\) of several.*got \[\]", lambda: gam_fast.GAM([weight], model=[])),
        (ValueError, "clip_grad_norm must be a positive number", lambda: gam_fast.GAM([weight], clip_grad_norm=0.0)),
        (ValueError, "on_nonfinite must be one of raise, skip", lambda: gam_fast.GAM([weight], on_nonfinite="warn")),
        (ValueError, "sync must be one of global, local, got 'Global'", lambda: gam_fast.SAM([weight], sync="Global")),
        (TypeError, "must be a torch optimizer class", lambda: gam_fast.GAM([weight], "sgd")),
        (TypeError, "must make a torch optimizer", lambda: gam_fast.GAM([weight], gam_fast.SAM)),
        (TypeError, "must make a torch optimizer", lambda: gam_fast.GAM([weight], lambda params: 3)),
        (TypeError, "params may be None only", lambda: gam_fast.GAM(None, sgd)),
        (TypeError, "unexpected arguments lr: base_optimizer", lambda: gam_fast.GAM(None, sgd([weight]), lr=0.1)),
        (ValueError, "over other parameters than params", lambda: gam_fast.GAM([other], sgd([weight]))),
        (TypeError, "is complex .torch.complex64.: optimize a real", lambda: gam_fast.GAM([imaginary])),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("value", "error"), [(-0.1, ValueError), (float("nan"), ValueError), ("0.1", TypeError), (None, TypeError)]
)
def test_a_value_of_a_group_that_was_changed_is_checked_in_the_step(value, error):
    weight, closure = parabola()
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    optimizer.step(closure)
    before = weight.detach().clone()
    optimizer.param_groups[0]["rho"] = value
    with pytest.raises(error, match=f"SAM: rho must .*, got {value!r}"):
        optimizer.step(closure)
    assert torch.equal(weight, before)
    optimizer.param_groups[0]["rho"] = 0.1
    optimizer.step(closure)
    assert not torch.equal(weight, before)


def test_rows_of_a_table_that_contradict_themselves_are_refused():
    recipe = gam_fast.recipes.Recipe
    move = gam_fast.recipes.Perturbation
    with pytest.raises(ValueError, match="goes along a gradient that is not taken yet"):
        recipe("X", "", {"rho": 0.1}, (move(1, "rho"),), (None, 1.0))
    with pytest.raises(ValueError, match="u needs 2 coefficients, the last not None"):
        recipe("X", "", {"rho": 0.1}, (move(0, "rho"),), (1.0, None))
    with pytest.raises(ValueError, match="and a gamma, or neither"):
        recipe("X", "", {"rho": 0.1}, (move(0, "rho"),), (None, 1.0), m=(1.0, None))
    with pytest.raises(ValueError, match=r"no default for \['rho'\]"):
        recipe("X", "", {}, (move(0, "rho"),), (None, 1.0))
    three = (move(0, "rho"), move(1, "rho"), move(2, "rho"))
    greedy = recipe("X", "", {"rho": 0.1}, (*three, move(0, "rho", minus=1)), (1.0, 1.0, 1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="at most two can be kept"):
        gam_fast.recipes.fold_plan(greedy)
    late = recipe("X", "", {"rho": 0.1}, (move(0, "rho"), move(1, "rho"), move(1, "rho", minus=0)), (1.0,) * 4)
    with pytest.raises(ValueError, match="move 2 would have two folds to carry out"):
        gam_fast.recipes.fold_plan(late)


@pytest.mark.parametrize("name", gam_fast.recipes.RECIPES)
def test_a_pickled_recipe_is_its_table_and_nothing_that_follows_from_it(name):
    recipe = gam_fast.recipes.RECIPES[name]
    assert recipe.plan == gam_fast.recipes.fold_plan(recipe)
    assert recipe.keeps[-1] is False
    for copied in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe)):
        assert copied == recipe
        assert vars(copied).keys() == {field.name for field in dataclasses.fields(recipe)}
        assert (copied.plan, copied.keeps, copied.plain) == (recipe.plan, recipe.keeps, recipe.plain)


def test_a_missing_or_old_torch_is_named():
    from gam_fast import _torch_version

    with pytest.raises(ImportError, match="needs PyTorch 2.6 or newer, found 2.1.2.cu118: pip install -U"):
        _torch_version.check("2.1.2+cu118")
    _torch_version.check("3.0.0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "torch", None)
        with pytest.raises(ImportError, match="needs PyTorch 2.6 or newer: pip install"):
            _torch_version.require_torch()


def test_late_and_vanishing_gradients_count_as_zero():
    """b is used in the second pass only, c in the first only: hand-computed SAM over (a, b, c)."""
    a, b, c = (nn.Parameter(torch.tensor([v], dtype=torch.float64)) for v in (1.0, 2.0, 3.0))
    optimizer = gam_fast.SAM([a, b, c], torch.optim.SGD, lr=0.1, momentum=0.9, rho=1.0)
    for turn in optimizer.passes():
        (a**2 + (c**2 if turn.index == 0 else b**2)).backward()
    step = 2.0 / (4.0 + 36.0) ** 0.5
    torch.testing.assert_close(a.detach(), torch.tensor([1 - 0.2 * (1 + step)], dtype=torch.float64))
    assert b.item() == pytest.approx(2 - 0.1 * 4.0)
    assert c.item() == 3.0
    assert torch.equal(optimizer.state[c]["momentum_buffer"], torch.zeros(1, dtype=torch.float64))


class Elsewhere(nn.Parameter):
    device = property(lambda self: torch.device("cpu", 0))


@pytest.mark.parametrize(("method_name", "late"), in_turn(METHODS, [True, False]))
def test_parameters_on_two_devices_share_one_norm(method_name, late):
    """A parameter that says it is on ``cpu:0`` stands for one elsewhere; ``late``: its gradients begin in pass 1."""
    method = METHODS[method_name]

    def run(kind):
        a = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        b = kind(torch.tensor([1.0, 2.0], dtype=torch.float64))
        optimizer = method.optimizer([a, b], torch.optim.SGD, lr=0.1, momentum=0.9, clip_grad_norm=3.0, **method.hyper)
        for _ in range(3):
            for turn in optimizer.passes():
                a.grad = torch.sin(a.detach())
                if turn.index or not late:
                    b.grad = torch.cos(b.detach())
        return a.detach(), b.detach()

    for p, q in zip(run(Elsewhere), run(nn.Parameter), strict=True):
        torch.testing.assert_close(p.as_subclass(torch.Tensor), q, rtol=1e-12, atol=1e-12)


def test_optimizers_of_one_model_and_of_the_same_parameters_take_turns_without_a_warning():
    model, batches = make("mlp")
    pairs = ((gam_fast.SAM, model.net[0]), (gam_fast.GAM, model.net[2]), (gam_fast.SAM, model.net[2]))
    optimizers = [method(part.parameters(), torch.optim.SGD, lr=0.1) for method, part in pairs]
    for batch in batches[:3]:
        for optimizer in optimizers:
            optimizer.step(closure_of(model, *batch))


def test_a_model_may_be_converted_after_a_step():
    """By torch's way to swap tensors, which refuses those that are referred to weakly."""
    model, batches = make("mlp", torch.float32)
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.step(closure_of(model, *batches[0]))
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    optimizer.zero_grad()  # which are new tensors now
    x, y = batches[0]
    optimizer.step(closure_of(model, x.double(), y))
    assert all(p.dtype == torch.float64 for p in model.parameters())


def test_the_limit_of_the_norm_may_be_set():
    weight, closure, optimizer = over_parabola(gam_fast.SAM, lr=0.5, clip_grad_norm=2.0)
    assert optimizer.clip_grad_norm == 2.0
    with pytest.raises(ValueError, match="clip_grad_norm must be a positive number or None, got -1.0"):
        optimizer.clip_grad_norm = -1.0
    optimizer.clip_grad_norm = 1e-3
    before = weight.detach().clone()
    optimizer.step(closure)
    assert float((weight.detach() - before).norm()) == pytest.approx(0.5e-3, rel=1e-6)
    optimizer.clip_grad_norm = None
    assert optimizer.clip_grad_norm is None


@pytest.mark.parametrize(
    "change", [lambda group: group["beta"].__setitem__(0, -3.0), lambda group: group["rho"].fill_(0.5)]
)
def test_a_value_of_a_group_may_be_changed_in_place(change):
    found = []
    for is_new in (False, True):
        weight, closure = parabola()
        optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1, rho=0.1, beta=[1.0, 0.5], gamma=0.5)
        (group,) = optimizer.param_groups
        group["rho"] = torch.tensor(0.1)
        optimizer.step(closure)
        group.update(copy.deepcopy({key: group[key] for key in ("rho", "beta")}) if is_new else {})
        change(group)
        optimizer.step(closure)
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("method", [gam_fast.SAM, gam_fast.FriendlySAM])
def test_the_variable_of_a_loop_keeps_no_gradient_alive(method):
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 7))
    optimizer = method(model[0].parameters(), torch.optim.SGD, lr=0.1, model=model)
    for _ in range(2):
        for turn in optimizer.passes():
            turn.backward(model(torch.ones(2, 7)).sum())
    known = {id(x) for p in model.parameters() for x in (p.grad, *optimizer.state.get(p, {}).values())}
    shapes = {p.shape for p in model.parameters() if p.dim() == 2}
    left = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape in shapes and id(x) not in known]
    assert not left
    assert turn.last


def test_threads_take_steps_of_their_own():
    def train_one(k):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
        optimizer = gam_fast.SAM(model[0].parameters(), torch.optim.SGD, lr=0.01, model=model)
        for _ in range(100):
            optimizer.step(lambda: model(torch.ones(4, 2)).square().sum().backward())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(train_one, range(8)))
    finally:
        sys.setswitchinterval(interval)
