"""The body runs once a pass and calls backward: misuse of a step is noticed, and the step undone."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from cases import FORMS, METHODS, pairwise, take_step
from test_engine import over_parabola, parabola
from torch import nn

import gam_fast


def optimizer_of(method_name, **options):
    method = METHODS[method_name]
    weight = nn.Parameter(torch.ones(3))
    return weight, method.optimizer([weight], torch.optim.SGD, lr=0.1, momentum=0.9, **method.hyper, **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method_name", ["base", "sam", "gam"])
def test_state_dict_is_refused_in_a_pass_whose_weights_are_perturbed(method_name, form):
    weight, optimizer = optimizer_of(method_name)
    taken = []

    def body():
        (weight**2).sum().backward()
        try:
            taken.append(optimizer.state_dict())
        except RuntimeError as error:
            assert "save both after the loop over passes" in str(error)  # noqa: PT017
            taken.append(None)

    for _ in range(2):
        taken.clear()
        before = optimizer.state_dict()
        take_step(optimizer, body, form)
        assert taken == [before] + [None] * (METHODS[method_name].passes - 1)
    assert optimizer.state_dict()["state"]  # behind the loop it is there


@pytest.mark.parametrize("of", ["optimizer", "base"])
@pytest.mark.parametrize("method_name", ["base", "sam", "gam"])
def test_hooks_around_the_update_may_take_a_checkpoint(method_name, of):
    weight, optimizer = optimizer_of(method_name)
    hooked = optimizer if of == "optimizer" else optimizer.base
    taken = []
    hooked.register_step_pre_hook(lambda *_: taken.append((optimizer.state_dict(), weight.tolist())))
    hooked.register_step_post_hook(lambda *_: taken.append((optimizer.state_dict(), weight.tolist())))
    before = weight.tolist()
    optimizer.step(lambda: (weight**2).sum().backward())
    assert [weights for _, weights in taken] == [before, weight.tolist()]


def test_after_an_undone_step_a_checkpoint_can_be_taken():
    weight, optimizer = optimizer_of("gam")
    for turn in optimizer.passes():
        (weight**2).sum().backward()
        if turn.index == 1:
            break
    optimizer.state_dict()


@pytest.mark.parametrize("form", ["passes", "closure", "step"])
def test_a_scheduler_that_steps_in_the_body_is_warned_of(form):
    weight, optimizer = optimizer_of("gam")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def body(turn):
        (weight**2).sum().backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about the first step
            scheduler.step()
        if form == "step" and turn.last:
            optimizer.step()

    with pytest.warns(UserWarning, match="learning rate was changed between the passes .* belongs after the loop"):
        take_step(optimizer, body, form)


def test_a_rate_that_the_body_sets_anew_in_each_step_is_no_reason_to_warn():
    """As in nanoGPT, where each iteration puts its rate into the groups first."""
    weight, optimizer = optimizer_of("gam")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for i in range(3):
        for _ in optimizer.passes():
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (i + 1)
            (weight**2).sum().backward()
        scheduler.step()


# Passes


@pytest.mark.parametrize("at", range(4))
def test_a_pass_without_backward_is_an_error_and_undone(at):
    weight, closure, optimizer = over_parabola(gam_fast.GAM, lr=0.1)

    def forgetful(turn):
        if turn.index != at:
            closure()

    for by_loop in (True, False):
        with pytest.raises(RuntimeError, match=f"pass {at} of GAM ended without a gradient.*call backward"):
            [forgetful(turn) for turn in optimizer.passes()] if by_loop else optimizer.step(forgetful)
        assert weight.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("at", range(4))
def test_parameters_changed_by_the_user_during_a_pass(at, named):
    weight, closure = parabola()
    optimizer = gam_fast.GAM([("scale", weight)] if named else [weight], torch.optim.SGD, lr=0.1)
    assert optimizer.param_groups[0].get("param_names") == (["scale"] if named else None)

    def meddle(turn):
        closure()
        if turn.index == at:
            with torch.no_grad():
                weight.mul_(2)

    name = r" \(scale\)" if named else ""
    message = f"parameter 0 of group 0{name}, of shape .2,., was modified during pass {at}"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step(meddle)
    # documented: in the first pass there is no backup yet, and the change is the user's
    assert weight.tolist() == ([6.0, 8.0] if at == 0 else [3.0, 4.0])


def test_calls_that_do_not_belong_inside_a_step():
    weight, closure, optimizer = over_parabola(gam_fast.GAM, lr=0.1)
    state = optimizer.state_dict()
    calls = [
        (r"step\(\)", lambda: optimizer.step()),
        (r"step\(\)", lambda: optimizer.step(closure)),
        (r"passes\(\)", lambda: next(optimizer.passes())),
        (r"add_param_group\(\)", lambda: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})),
        (r"load_state_dict\(\)", lambda: optimizer.load_state_dict(state)),
        ("pickling or copying", lambda: copy.deepcopy(optimizer)),
        ("setting clip_grad_norm", lambda: setattr(optimizer, "clip_grad_norm", None)),
        ("setting ascent_share", lambda: setattr(optimizer, "ascent_share", 0.25)),
        ("setting interval", lambda: setattr(optimizer, "interval", 2)),
        ("setting active", lambda: setattr(optimizer, "active", None)),
    ]
    for message, call in calls:

        def nested(turn, call=call):
            closure()
            if turn.index == 1:
                call()

        with pytest.raises(RuntimeError, match=message + ".* while a step of this GAM is in progress"):
            optimizer.step(nested)
        assert weight.tolist() == [3.0, 4.0]
    optimizer.step(closure)


def test_an_iterator_that_is_kept_open_blocks_until_it_is_closed():
    weight, closure, optimizer = over_parabola(gam_fast.SAM, lr=0.1, rho=1.0)
    turns = optimizer.passes()
    next(turns)
    closure()
    next(turns)
    assert weight.tolist() != [3.0, 4.0]
    with pytest.raises(RuntimeError, match=r"close\(\) the iterator"):
        optimizer.step(closure)
    turns.close()
    assert weight.tolist() == [3.0, 4.0]
    never_started = optimizer.passes()
    optimizer.step(closure)
    never_started.close()
    by_hand = optimizer.passes()
    while next(by_hand, None) is not None:
        closure()
    assert weight.tolist() != [3.0, 4.0]


def test_step_without_closure_is_the_base_step_for_one_pass_and_says_what_to_do_for_several():
    weight, closure = parabola()
    closure()
    for optimizer in (
        gam_fast.GAM([weight], torch.optim.SGD, lr=0.1),
        gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, interval=2),  # in a plain step too
        gam_fast.ExactGAM([weight], torch.optim.SGD, lr=0.1),
    ):
        with pytest.raises(RuntimeError, match=r"passes a step: call step\(closure\).*optimizer.passes\(\)"):
            optimizer.step()
    assert gam_fast.Base([weight], torch.optim.SGD, lr=0.5).step() is None
    assert weight.tolist() == [0.0, 0.0]


NOTHING = {
    "no closure": lambda optimizer: optimizer.step(),
    "a closure": lambda optimizer: optimizer.step(lambda: None),
    "a loop": lambda optimizer: [None for _ in optimizer.passes()],
}


@pytest.mark.parametrize(
    ("how", "base", "options"),
    pairwise(
        NOTHING,
        [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad],
        [{}, {"clip_grad_norm": 1.0}, {"on_nonfinite": "skip"}],
    ),
)
def test_one_pass_without_any_gradient_does_nothing_as_in_torch(how, base, options):
    weight, closure, optimizer = over_parabola(gam_fast.Base, base, lr=0.5, **options)
    plain = base([copy.deepcopy(weight)], lr=0.5)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    NOTHING[how](optimizer)
    plain.step()
    scheduler.step()  # does not warn that no step came before it
    assert weight.tolist() == [3.0, 4.0]
    made = plain.state.values()  # by the constructor of Adagrad, nowhere else
    torch.testing.assert_close(dict(optimizer.state), dict(zip([weight], made, strict=False)))
    assert (called, optimizer.skipped_steps) == (["pre", "post"], 0)
    closure()
    optimizer.step()
    assert weight.tolist() != [3.0, 4.0]


def test_an_inactive_step_without_any_gradient_does_nothing():
    weight, _, optimizer = over_parabola(gam_fast.GAM, lr=0.5, interval=math.inf)
    assert optimizer.step(lambda: 7.0) == 7.0
    for _ in optimizer.passes():
        pass
    assert weight.tolist() == [3.0, 4.0]
    optimizer.interval = 1
    with pytest.raises(RuntimeError, match="pass 0 of GAM ended without a gradient"):
        optimizer.step(lambda: None)
    assert weight.tolist() == [3.0, 4.0]


@pytest.mark.usefixtures("_on_eager_and_native")
@pytest.mark.parametrize("method", [gam_fast.Base, gam_fast.GAM, gam_fast.ExactGAM])
def test_sparse_gradients_are_refused_and_the_step_undone(method):
    embedding = nn.Embedding(4, 2, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = method(embedding.parameters(), torch.optim.SGD, lr=0.1)

    def step():
        for turn in optimizer.passes():
            turn.backward(embedding(torch.tensor([1, 2])).square().sum())

    with pytest.raises(TypeError, match="sparse=False"):
        step()
    assert torch.equal(embedding.weight, before)
