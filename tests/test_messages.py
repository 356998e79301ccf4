"""What a newcomer writes by mistake, and what the error says to write instead."""

from __future__ import annotations

import copy
import functools
import inspect
import pydoc
import re

import pytest
import torch
from cases import make
from torch import nn

import gam_fast
from gam_fast import options

P = [nn.Parameter(torch.ones(2))]
SGD = torch.optim.SGD


def swallowing(params, lr=0.1, **others):
    return SGD(params, lr=lr)


CALLS = {
    "misspelt hyper-parameter": (lambda: gam_fast.GAM(P, SGD, lr=0.1, rh=0.1), "'rh' .0.1.: did you mean rho.*SGD lr"),
    "misspelt, any base": (lambda: gam_fast.SAM(P, swallowing, rh=0.1), "SAM got an unexpected.*did you mean rho"),
    "misspelt, an instance": (lambda: gam_fast.SAM(None, SGD(P), rh=0.1), "did you mean rho"),
    "misspelt, a partial": (
        lambda: gam_fast.SAM(P, functools.partial(SGD, lr=0.1), moment=0.1),
        "did you mean momentum.*SAM takes rho, model, backend",
    ),
    "misspelt option": (lambda: gam_fast.Base(P, on_nonfinit="skip"), "did you mean on_nonfinite"),
    "of another method": (lambda: gam_fast.SAM(P, rho_prime=0.1), "SAM got an unexpected keyword argument 'rho_prime'"),
    "unknown": (lambda: gam_fast.FAD(P, xyzzy=1), "unexpected keyword argument 'xyzzy' .1.: FAD takes rho, rho_prime"),
    "adaptive": (lambda: gam_fast.SAM(P, adaptive=True), "gam_fast.ASAM"),
    "adaptive, any base": (lambda: gam_fast.SAM(P, swallowing, adaptive=True), "gam_fast.ASAM"),
    "clip_norm": (lambda: gam_fast.GAM(P, clip_norm=1.0), "write clip_grad_norm="),
    "max_grad_norm": (lambda: gam_fast.GAM(P, max_grad_norm=1.0), "write clip_grad_norm="),
    "base": (lambda: gam_fast.GAM(P, lr=0.1, base=SGD), "base_optimizer="),
    "of the release": (lambda: gam_fast.GAM(P, grad_rho=0.1), "rho_prime="),
    "optimizer": (lambda: gam_fast.GAM(SGD(P, lr=0.1)), r"is an optimizer .SGD.: write GAM\(None, optimizer\)"),
    "module": (lambda: gam_fast.GAM(nn.Linear(2, 1)), r"is a module .Linear.: write GAM\(model.parameters\(\)"),
    "method": (lambda: gam_fast.GAM(nn.Linear(2, 1).parameters), r"is a function: call it"),
    "name": (lambda: gam_fast.GAM(P, "adamw"), "got 'adamw': write torch.optim.AdamW"),
    "number": (lambda: gam_fast.GAM(P, 0.1), "got 0.1: a learning rate is lr=0.1"),
    "swapped": (lambda: gam_fast.GAM(SGD, P), "is a class, SGD: the parameters come first"),
    "module as base": (lambda: gam_fast.GAM(P, nn.Linear(2, 1)), r"is a module .Linear.: write model="),
    "capitals": (lambda: gam_fast.GAM(P, Rho=0.1), "did you mean rho"),
    "limit in words": (lambda: gam_fast.GAM(P, clip_grad_norm="1"), "clip_grad_norm must be a number or None, got '1'"),
    "limit or not": (lambda: gam_fast.GAM(P, clip_grad_norm=True), "clip_grad_norm must be a number or None, got True"),
    "closure of passes": (lambda: gam_fast.GAM(P).passes(lambda: 0), r"got .*a closure is for step\(closure\)"),
    "class of scalers": (lambda: gam_fast.GAM(P).passes(torch.amp.GradScaler), "scaler must be a .*got <class"),
    "number as scaler": (
        lambda: gam_fast.GAM(P).step(lambda: None, scaler=3),
        "scaler must be a .*GradScaler or None, got 3",
    ),
    "loss": (lambda: gam_fast.GAM(P).step(torch.ones(())), r"takes a closure, not the loss: def closure\(\)"),
    "number as closure": (lambda: gam_fast.GAM(P).step(3), "takes a closure; got int"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_mistake_is_a_type_error_that_says_what_to_write(name):
    call, message = CALLS[name]
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("key", ["rh", "rho_prim", "Gamma", "alphas"])
def test_a_misspelt_key_of_a_parameter_group_is_an_error(key):
    optimizer, group = gam_fast.GAM([nn.Parameter(torch.ones(2))]), {"params": P, key: 0.1}
    for call in (lambda: gam_fast.GAM([group]), lambda: optimizer.add_param_group(group)):
        with pytest.raises(ValueError, match=f"group of GAM has '{key}' .0.1., which no code reads: did you mean "):
            call()


def test_other_keys_of_parameter_groups_are_the_users():
    mine = {"lr_scale": 0.5, "name": "head", "betas": (0.9, 0.99), "group_name": "rest"}
    optimizer = gam_fast.GAM([{"params": P, **mine}])
    assert mine.items() <= optimizer.param_groups[0].items()


def test_what_a_base_takes_is_passed_on():
    optimizer = gam_fast.GAM(P, swallowing, lr=0.3, betas=(0.9, 0.99), something=1)
    assert optimizer.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("name", ["first_step", "second_step", "ascent_step", "set_closure"])
def test_methods_of_other_packages(name):
    optimizer = gam_fast.SAM(P)
    assert not hasattr(optimizer, name)
    with pytest.raises(AttributeError, match=f"'SAM' object has no attribute '{name}': .*for turn in optimizer.passes"):
        getattr(optimizer, name)
    with pytest.raises(AttributeError, match="'SAM' object has no attribute 'anything'$"):
        _ = optimizer.anything


@pytest.mark.parametrize("method", [gam_fast.Base, gam_fast.GAM])
def test_a_parameter_that_is_listed_twice_is_said_to_be(method):
    weight = nn.Parameter(torch.ones(2, 3))
    message = r"shape .2, 3. is listed twice in a parameter group: list each once"
    for params in ([weight, weight], [{"params": [weight, *P, weight]}], [("a", weight), ("b", weight)]):
        with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match=message):
            method(params)
    optimizer = method(P)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [weight, weight]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="more than one parameter group"):  # torch's own words
        optimizer.add_param_group({"params": P})


def test_parameters_without_values():
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"shape .2, 3. is on the meta device.*to_empty"):
        gam_fast.GAM(model.parameters())
    model.to_empty(device="cpu")
    gam_fast.GAM(model.parameters())


# Closures


class Callable:
    def plain(self):
        return ()

    def with_turn(self, turn):
        return (turn,)

    def __call__(self, turn):
        return (turn,)


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def given_a_batch(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function("batch", *args)

    return wrapper


WITHOUT = {
    "plain": lambda: (),
    "default": lambda x=1: (),
    "a default called turn": lambda turn=None: (turn,) if turn else (),
    "method": Callable().plain,
    "decorated": logged(lambda: ()),
    "any": lambda *args, **kwargs: args,
    "bound": functools.partial(lambda x: (), 1),
    "bound by name": functools.partial(lambda x: (), x=1),
    "a wrapper that gives it": given_a_batch(lambda batch: ()),
}
WITH = {
    "plain": lambda turn: (turn,),
    "default": lambda turn, x=1: (turn,),
    "keyword": lambda *, turn: (turn,),
    "method": Callable().with_turn,
    "object": Callable(),
    "decorated": logged(lambda turn: (turn,)),
    "bound": functools.partial(lambda x, turn: (turn,), 1),
    "bound by name": functools.partial(lambda x, turn: (turn,), x=1),
    "a wrapper that gives the other": given_a_batch(lambda batch, turn: (turn,)),
}
OTHERS = {
    "one": lambda batch: (),
    "a short name": lambda t: (),
    "two": lambda x, y: (),
    "turn and another": lambda turn, x: (),
    "keyword": lambda *, x: (),
    "bound": functools.partial(lambda x, y: (), 1),
}


def test_memory_that_processes_share_is_warned_of_once():
    model = nn.Linear(2, 3).share_memory()
    gam_fast.Base(model.parameters(), torch.optim.SGD)  # moves nothing but by the update, as SGD does
    optimizer = gam_fast.SAM(P, torch.optim.SGD)
    for make_it in (
        lambda: gam_fast.SAM(model.parameters(), torch.optim.SGD),
        lambda: optimizer.add_param_group({"params": model.parameters()}),
    ):
        with pytest.warns(UserWarning, match="memory that other processes may share") as caught:
            make_it()
        assert len(caught) == 1
    gam_fast.SAM(copy.deepcopy(model).parameters(), torch.optim.SGD)


@pytest.mark.parametrize(("table", "name"), [(t, name) for t in ("WITHOUT", "WITH") for name in globals()[t]])
def test_a_closure_gets_the_turn_where_its_argument_is_called_so(table, name):
    evaluate = gam_fast.turn.evaluation(globals()[table][name])
    turn = object()
    assert evaluate(turn) == ((turn,) if table == "WITH" else ())


@pytest.mark.parametrize("name", OTHERS)
def test_a_closure_that_needs_something_else_is_refused_before_the_step(name):
    model, _ = make("mlp")
    optimizer = gam_fast.GAM(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="the closure needs .*called without arguments, or with the pass where"):
        optimizer.step(OTHERS[name])
    assert optimizer.turn is None


# The documentation of options


def methods():
    return [getattr(gam_fast, name) for name in gam_fast.recipes.RECIPES] + [gam_fast.SharpnessAwareOptimizer]


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.__name__)
def test_help_explains_every_option(method):
    text = pydoc.plain(pydoc.render_doc(method))
    for name in ("params", "base_optimizer", *options.names()):
        assert len(re.findall(rf"^ \|  +{name}: ", text, flags=re.MULTILINE)) == 1, name
    assert len(text.splitlines()) < 460, "a third of it is torch's own, of hooks and zero_grad"
    assert "those of every method" not in text
    assert "as everywhere" not in text


def test_options_have_one_text_and_one_type_each():
    taken = inspect.signature(gam_fast.SharpnessAwareOptimizer.__init__).parameters.values()
    taken = {p.name: p.annotation for p in taken if p.kind is p.KEYWORD_ONLY}
    typed = {key: value for key, value in options.Options.__annotations__.items() if key in taken}
    assert set(taken) == set(options.names()) == set(typed)
    mine = set(options.Options.__annotations__) - set(options.BaseArguments.__annotations__)
    assert mine == set(taken)
    for key, value in typed.items():
        assert getattr(value, "__forward_arg__", value) == taken[key], key
    for method in methods()[:-1]:
        assert "options" in inspect.signature(method).parameters


def test_arguments_of_all_of_torchs_optimizers_have_a_type():
    typed = set(options.OptionsOfBase.__annotations__) | set(options.Options.__annotations__)
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "ASGD", "RMSprop", "Rprop"):
        assert set(inspect.signature(getattr(torch.optim, name)).parameters) - {"params"} <= typed, name
