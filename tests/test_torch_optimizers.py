"""By torch's own description of its optimizers: what torch asserts of each holds around each, over all of its inputs.

``torch.testing._internal.common_optimizers`` is what torch's tests are generated from: every optimizer, its arguments
with and without foreach and fused, and the arguments that it refuses. It is private, but installed with torch.
"""

from __future__ import annotations

import copy
import re
import sys
from functools import partial

import pytest
import torch
from cases import BACKENDS, METHODS, in_turn, pairwise
from snapshots import COPIES, through_a_file
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def _description():
    """The module; its import reads the command line, and forbids to set ``torch.backends`` from then on."""
    argv, sys.argv = sys.argv, sys.argv[:1]
    frozen = torch.backends.flags_frozen()
    try:
        from torch.testing._internal import common_optimizers
    finally:
        sys.argv = argv
        if not frozen:
            torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return common_optimizers


common_optimizers = _description()

NO_BASE = {"LBFGS": "evaluates its own closure", "SparseAdam": "needs sparse gradients"}
"""Those that cannot be a base, and why, which the error says."""

INFOS = {info.optim_cls.__name__: info for info in common_optimizers.optim_db}
BASES = {name: info for name, info in INFOS.items() if name not in NO_BASE}

SEVERAL = ["sam", "gam"]
SOME = ["base", *SEVERAL]

ROUNDED = {"SGD", "Adam", "AdamW"}
"""One primitive takes the step of these: within some ulp of torch's own. Of the others torch takes the step."""

over_bases = pytest.mark.parametrize("name", BASES)
in_turn_by_method = pytest.mark.parametrize(("name", "method"), in_turn(BASES, SOME))


def inputs(name, *factors, flags=False):
    """Each input that torch has for an optimizer once, with values of the factors, of which any two meet in time.

    With ``flags`` each with and without ``foreach`` and ``fused``. Not with ``differentiable``, with which no torch
    optimizer can step parameters that are leaves.
    """
    given = BASES[name].optim_inputs_func(device="cpu")
    if flags:
        given = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs(
            "cpu", torch.float32, BASES[name], skip=("differentiable",)
        )
    assert len(given) >= 4
    rows = pairwise(*factors) if len(factors) > 1 else [(value,) for value in factors[0]]
    first = list(BASES).index(name)
    for i, each in enumerate(given):
        yield (each, *rows[(first + i) % len(rows)])


def parameters(name, dtype=torch.float32):
    """The same at every call; Muon takes matrices only."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        found = [torch.randn(4, 3), torch.randn(3, 5), *([] if name == "Muon" else [torch.randn(6)])]
    return [nn.Parameter(tensor.to(dtype)) for tensor in found]


def loss_of(params):
    return sum((p.square() / 2 + p.sin()).sum() for p in params) * 0.5


def closure_of(optimizer, params):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    return closure


def plain(name, params, kwargs):
    return BASES[name].optim_cls(params, **copy.deepcopy(kwargs))


def ours(method, name, params, kwargs, **own):
    base = partial(BASES[name].optim_cls, **copy.deepcopy(kwargs))
    return METHODS[method].optimizer(params, base, **{**METHODS[method].hyper, **own})


def without_a_radius(method):
    return {key: 0.0 for key in METHODS[method].hyper if key in ("rho", "rho_prime", "gamma")}


def take(optimizer, params, steps=2):
    return [float(optimizer.step(closure_of(optimizer, params)).detach()) for _ in range(steps)]


def step_by(form, optimizer, params):
    if form == "closure":
        return optimizer.step(closure_of(optimizer, params)).detach()
    if form == "loop":
        for _ in optimizer.passes():
            loss_of(params).backward()
    else:
        closure_of(optimizer, params)()
        optimizer.step()
    return None


def assert_same(found, expected, what, exact=True, rtol=1e-5, atol=1e-6):
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(found, expected, **tolerance, msg=lambda text: f"{what}: {text}")


def assert_alike(optimizer, params, other, theirs, what, exact=True):
    """Their parameters and state."""
    assert_same(params, theirs, what, exact)
    assert_same_state(optimizer.state_dict(), other.state_dict(), what, exact)


def assert_same_state(found, expected, what, exact=True):
    """Of two state_dicts; the first may have more in its groups: the hyper-parameters of its method."""
    assert_same(dict(found["state"]), dict(expected["state"]), what, exact)
    for group, other in zip(found["param_groups"], expected["param_groups"], strict=True):
        for key, value in other.items():
            if isinstance(value, str):
                assert group[key] == value
            else:
                assert_same(group[key], value, f"{what}, {key}")


@pytest.mark.parametrize("name", NO_BASE)
def test_what_cannot_be_a_base_says_why(name):
    with pytest.raises(TypeError, match=f"{name} cannot be the base optimizer, because it {NO_BASE[name]}"):
        METHODS["gam"].optimizer(parameters(name), INFOS[name].optim_cls)


@over_bases
def test_base_takes_the_steps_of_the_plain_optimizer(name):
    dtypes, forms = [torch.float32, torch.float64], ["closure", "loop", "backward first"]
    for given, dtype, form, backend in inputs(name, dtypes, forms, BACKENDS, flags=True):
        theirs, params = parameters(name, dtype), parameters(name, dtype)
        expected = plain(name, theirs, given.kwargs)
        losses = take(expected, theirs, 3)
        optimizer = ours("base", name, params, given.kwargs, backend=backend)
        for loss in losses:
            found = step_by(form, optimizer, params)
            if form == "closure":
                assert_same(float(found), loss, given.desc, name not in ROUNDED)
        assert_alike(optimizer, params, expected, theirs, f"{given.desc}, {form}", name not in ROUNDED)


@over_bases
def test_without_a_radius_they_take_the_steps_of_the_plain_optimizer(name):
    for given, method, backend in inputs(name, SEVERAL, BACKENDS):
        theirs, params = parameters(name, torch.float64), parameters(name, torch.float64)
        losses = take(plain(name, theirs, given.kwargs), theirs)
        optimizer = ours(method, name, params, given.kwargs, backend=backend, **without_a_radius(method))
        assert_same(take(optimizer, params), losses, given.desc, exact=False)
        assert_same(params, theirs, given.desc, exact=False)


@over_bases
def test_a_state_dict_resumes_with_the_same_bits(name):
    """Counters that are numbers are of an old checkpoint; torch's ``__setstate__`` makes tensors of them."""
    for given, method, how in inputs(name, SOME, ["copied", "from a file", "counters are numbers"]):
        params = parameters(name)
        optimizer = ours(method, name, params, given.kwargs)
        take(optimizer, params)
        state = (through_a_file if how == "from a file" else copy.deepcopy)(optimizer.state_dict())
        for entry in state["state"].values() if how == "counters are numbers" else ():
            if torch.is_tensor(entry.get("step")):
                entry["step"] = entry["step"].item()
        again = copy.deepcopy(params)
        resumed = ours(method, name, again, {"lr": 0.5})
        resumed.load_state_dict(state)
        assert_same_state(resumed.state_dict(), optimizer.state_dict(), given.desc)
        assert take(resumed, again) == take(optimizer, params), given.desc
        assert_alike(resumed, again, optimizer, params, given.desc)


@over_bases
def test_checkpoints_go_both_ways_with_the_plain_optimizer(name):
    for given, backend in inputs(name, BACKENDS, flags=True):
        theirs = parameters(name)
        expected = plain(name, theirs, given.kwargs)
        take(expected, theirs)
        params = copy.deepcopy(theirs)
        optimizer = ours("base", name, params, {"lr": 0.5}, backend=backend)
        optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
        back = plain(name, copy.deepcopy(theirs), {"lr": 0.5})
        back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert_same_state(back.state_dict(), expected.state_dict(), given.desc)
        take(expected, theirs)
        take(optimizer, params)
        assert_same(params, theirs, given.desc, name not in ROUNDED)


@over_bases
def test_a_copy_has_all_of_it_and_takes_the_same_steps(name):
    for given, method, copied in inputs(name, SOME, [COPIES["deepcopy"], COPIES["pickle"]]):
        params = parameters(name)
        optimizer = ours(method, name, params, given.kwargs)
        take(optimizer, params)
        twin, others = copied((optimizer, params))
        public = {key for key in vars(optimizer) if not key.startswith("_")}
        assert public == {key for key in vars(twin) if not key.startswith("_")}
        assert type(twin) is type(optimizer)
        assert twin.defaults.keys() == optimizer.defaults.keys()
        assert twin.param_groups[0]["params"][0] is others[0]
        assert take(twin, others) == take(optimizer, params), given.desc
        assert_alike(twin, others, optimizer, params, given.desc)


@in_turn_by_method
def test_names_of_parameters_are_kept_and_may_be_missing(name, method):
    params = parameters(name)
    names = [f"p{i}" for i in range(len(params))]
    optimizer = ours(method, name, list(zip(names, params, strict=True)), {})
    take(optimizer, params)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == names
    other = ours(method, name, parameters(name), {})
    unnamed = other.state_dict()
    other.load_state_dict(state)
    assert_same(dict(other.state_dict()["state"]), dict(state["state"]), "to one without names")
    optimizer.load_state_dict(unnamed)
    assert optimizer.param_groups[0]["param_names"] == names


@in_turn_by_method
def test_step_hooks_run_once_a_step_whatever_its_form(name, method):
    """Those of all optimizers do not run for the base, whose step a scheduler has wrapped."""
    params = parameters(name)
    optimizer = ours(method, name, params, {})
    scheduler = lr_scheduler.StepLR(optimizer.base, 1)
    seen = []

    def note(what):
        return lambda instance, args, kwargs: seen.append((what, instance))

    handles = [
        register_optimizer_step_pre_hook(note("all pre")),
        register_optimizer_step_post_hook(note("all post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.base.register_step_pre_hook(note("base pre")),
        optimizer.base.register_step_post_hook(note("base post")),
    ]
    order = ["all pre", "pre", "base pre", "base post", "post", "all post"]
    once = [(what, optimizer.base if "base" in what else optimizer) for what in order]
    try:
        for form in ("closure", "closure", "loop", "backward first" if method == "base" else "loop"):
            step_by(form, optimizer, params)
            scheduler.step()
            assert seen == once
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    take(optimizer, params, 1)
    assert seen == []


def test_hooks_of_the_state_dict_run_in_their_order_and_may_replace_it():
    optimizer = ours("gam", "SGD", parameters("SGD"), {})
    seen = []

    def replace(what):
        def hook(_, state):
            seen.append(what)
            return {**state, what: True}

        return hook

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("pre"))
    optimizer.register_state_dict_post_hook(replace("second"))
    optimizer.register_state_dict_post_hook(replace("first"), prepend=True)
    state = optimizer.state_dict()
    assert seen == ["pre", "first", "second"]
    assert state.pop("first")
    assert state.pop("second")
    seen.clear()

    def other_rate(_, state):
        seen.append("load pre")
        return {**state, "param_groups": [{**group, "lr": 0.25} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(other_rate)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("load post"))
    optimizer.load_state_dict(state)
    assert seen == ["load pre", "load post"]
    assert optimizer.param_groups[0]["lr"] == 0.25


@over_bases
def test_groups_have_their_own_values(name):
    """As two optimizers of one group each, for those that work on each parameter alone; then one group more."""
    rates = ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 1e-3, "weight_decay": 0.0})
    for given, method, backend in inputs(name, SOME, BACKENDS):
        kwargs = {key: value for key, value in given.kwargs.items() if key not in ("lr", "weight_decay")}
        params, theirs = parameters(name), parameters(name)
        mine, its = ([{"params": [some[0]], **rates[0]}, {"params": some[1:], **rates[1]}] for some in (params, theirs))
        optimizer = ours(method, name, mine, kwargs, backend=backend, **without_a_radius(method))
        expected = plain(name, its, kwargs)
        for one, some in ((optimizer, params), (expected, theirs)):
            take(one, some, 2)
            some.append(nn.Parameter(torch.ones(2, 2)))
            one.add_param_group({"params": [some[-1]], "lr": 0.02})
            take(one, some, 2)
        assert len(optimizer.param_groups) == 3
        exact = method == "base" and name not in ROUNDED
        assert_alike(optimizer, params, expected, theirs, given.desc, exact)


@over_bases
def test_a_rate_that_is_a_tensor_is_a_rate(name):
    """It may change in place; a combination that torch refuses is refused."""
    for given, method in inputs(name, SOME):
        kwargs = {**given.kwargs, "lr": torch.tensor(1e-2)}
        try:
            plain(name, parameters(name), kwargs)
        except ValueError as error:
            with pytest.raises(ValueError, match=re.escape(str(error))):
                ours(method, name, parameters(name), kwargs)
            continue
        params, theirs = parameters(name), parameters(name)
        optimizer = ours(method, name, params, kwargs)
        other = ours(method, name, theirs, {**kwargs, "lr": 1e-2})
        for change in (1.0, 0.5):
            optimizer.param_groups[0]["lr"].mul_(change)
            other.param_groups[0]["lr"] *= change
            take(optimizer, params, 2)
            take(other, theirs, 2)
        assert_same(params, theirs, given.desc, exact=False)
        assert torch.is_tensor(optimizer.state_dict()["param_groups"][0]["lr"])


DIVIDES_BY_ELEMENTS = {"Adafactor"}
"""Those whose own step fails for a parameter without elements: Adafactor divides by their number."""


@over_bases
def test_gradients_of_zero_and_parameters_without_elements(name):
    shapes = ((3, 2), (int(name in DIVIDES_BY_ELEMENTS), 1), (2, 2))
    for given, method in inputs(name, SOME):
        params, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
        for optimizer, some in (
            (ours(method, name, params, given.kwargs), params),
            (plain(name, theirs, given.kwargs), theirs),
        ):
            some[2].requires_grad_(False)
            for _ in range(2):
                optimizer.step(lambda some=some: ((some[0].sum() + some[1].sum()) * 0.0).backward())
        assert_same(params, theirs, given.desc, exact=False)


@over_bases
def test_base_refuses_what_torch_refuses(name):
    for given in BASES[name].optim_error_inputs_func(device="cpu", dtype=torch.float32):
        wrong = given.optimizer_error_input
        values = parameters(name) if wrong.params is None else wrong.params
        make = partial(ours, "base", name, values, wrong.kwargs)
        complex_ones = "complex" in given.error_regex
        if given.error_on != common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR:
            continue
        if given.error_type is UserWarning:  # which is an error in our tests
            with pytest.raises((UserWarning, ValueError), match="duplicate|twice|more than"):
                make()
        else:
            with pytest.raises(TypeError if complex_ones else given.error_type, match="complex|" + given.error_regex):
                make()
    with pytest.raises((TypeError, ValueError, RuntimeError), match="complex"):
        ours("gam", name, [nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], {})


@over_bases
def test_a_scaler_steps_and_skips_as_with_the_plain_optimizer(name):
    for given, backend, unscales in inputs(name, BACKENDS, [False, True], flags=True):
        params, theirs = parameters(name), parameters(name)
        optimizer = ours("base", name, params, given.kwargs, backend=backend)
        expected = plain(name, theirs, given.kwargs)
        for some, one in ((params, optimizer), (theirs, expected)):
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=100)
            for factor in (1.0, float("inf"), 1.0):
                one.zero_grad()
                (scaler.scale(loss_of(some)) * factor).backward()
                if unscales:
                    scaler.unscale_(one)
                scaler.step(one)
                scaler.update()
            assert scaler.get_scale() == 32.0
        assert_alike(optimizer, params, expected, theirs, given.desc, name not in ROUNDED)


SCHEDULERS = {
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "StepLR": partial(lr_scheduler.StepLR, step_size=2),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[1, 3]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.8),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=4),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=4),
    "CyclicLR": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=6),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)], [2]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)], optimizer=optimizer
    ),
    "SWALR": partial(torch.optim.swa_utils.SWALR, swa_lr=0.05),
}


def test_every_scheduler_of_torch_is_tried():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize(("scheduler_name", "method"), in_turn(SCHEDULERS, SOME))
def test_a_scheduler_does_what_it_does_to_the_plain_optimizer(scheduler_name, method):
    histories = []
    for by_us in (True, False):
        params = parameters("SGD")
        kwargs = {"lr": 0.1, "momentum": 0.9}
        optimizer = ours(method, "SGD", params, kwargs) if by_us else plain("SGD", params, kwargs)
        scheduler = SCHEDULERS[scheduler_name](optimizer)
        history = []
        for _ in range(5):
            take(optimizer, params, 1)
            scheduler.step(*([1.0] if scheduler_name == "ReduceLROnPlateau" else []))
            history.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        state = scheduler.state_dict()
        scheduler.load_state_dict(copy.deepcopy(state))
        histories.append(history)
    assert histories[0] == histories[1]
    assert len({lr for lr, _ in histories[0]}) > 1 or scheduler_name in ("ConstantLR",)
