"""Step hooks: in each form they find the final direction in ``param.grad``, as with torch's optimizers."""

import copy
from functools import partial

import pytest
import torch
from cases import ALL, METHODS, closure_of, in_turn, loss_of, setting
from snapshots import assert_close, assert_same, everything
from test_trajectories import reference_step
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gam_fast
from gam_fast.recipe import MEMORIES

BASES = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, alpha=0.9, eps=1e-4),
}
FORMS = ["loop", "closure", "step in the last pass"]


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def clip(optimizer, args, kwargs):
    nn.utils.clip_grad_norm_(parameters_of(optimizer), 0.01)


def replace(optimizer, args, kwargs):
    """Other tensors, of other strides."""
    for p in parameters_of(optimizer):
        p.grad = (p.grad.sign() * 0.01).t().contiguous().t() if p.dim() > 1 else p.grad.sign() * 0.01


def leave_out(optimizer, args, kwargs):
    for p in parameters_of(optimizer)[::2]:
        p.grad = None


def shrink(optimizer, args, kwargs):
    """The weights themselves."""
    with torch.no_grad():
        for p in parameters_of(optimizer):
            p.mul_(0.9)


def take_step(form, model, optimizer, x, y):
    if form == "closure":
        optimizer.step(closure_of(model, x, y))
        return
    for turn in optimizer.passes():
        loss_of(model, x, y).backward()
        if form == "step in the last pass" and turn.last:
            optimizer.step()


@pytest.mark.parametrize(("method_name", "base_name"), in_turn(METHODS, BASES))
def test_a_pre_hook_works_on_the_final_direction(method_name, base_name):
    """Torch's own optimizer with the same hook, and the direction by the book as its gradient, is the oracle."""
    method = ALL[method_name]
    for hook in (clip, replace, leave_out, shrink):
        ours, optimizer, batches = setting(method_name, BASES[base_name])
        theirs = copy.deepcopy(ours)
        plain = BASES[base_name](theirs.parameters())
        for each in (optimizer, plain):
            each.register_step_pre_hook(hook)
        for form, (x, y) in zip(FORMS, batches, strict=False):
            take_step(form, ours, optimizer, x, y)
            reference_step(theirs, plain, method, method.hyper, x, y)
        assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert optimizer.state[p].keys() - set(MEMORIES) == plain.state[q].keys()


@pytest.mark.parametrize("where", ["optimizer", "base", "everywhere"])
@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_a_hook_may_give_a_gradient_to_a_parameter_without_one(method_name, where):
    method = ALL[method_name]
    ours, optimizer, batches = setting(method_name, torch.optim.SGD, "partly_used", lr=0.1)
    theirs = copy.deepcopy(ours)
    trained, its = ([p for p in model.parameters() if p.requires_grad] for model in (ours, theirs))
    plain = torch.optim.SGD(its, lr=0.1)

    def adding(params):
        def add(*_):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.1 * i) if p.grad is None else p.grad + 0.1 * i

        return add

    of = {"optimizer": optimizer, "base": optimizer.base}
    register = of[where].register_step_pre_hook if where in of else register_optimizer_step_pre_hook
    plain.register_step_pre_hook(adding(its))
    for x, y in batches[:2]:
        handle = register(adding(trained))
        take_step("loop", ours, optimizer, x, y)
        handle.remove()
        reference_step(theirs, plain, method, method.hyper, x, y)
    assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("method_name", "dtype"), in_turn(METHODS, [torch.float32, torch.bfloat16]), ids=str)
def test_a_hook_that_only_looks_changes_nothing(method_name, dtype):
    (one, plain, batches), (two, watched, _) = (
        setting(method_name, torch.optim.AdamW, dtype=dtype, clip_grad_norm=0.1) for _ in range(2)
    )
    dtypes = set()
    watched.register_step_pre_hook(lambda *_: dtypes.update(p.grad.dtype for p in two.parameters()))
    for x, y in batches:
        take_step("loop", one, plain, x, y)
        take_step("closure", two, watched, x, y)
        assert_close(one, two, rtol=0.02 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    assert dtypes == {dtype}


@pytest.mark.parametrize("method_name", ["base", "sam", "gam"])
def test_the_gradient_of_the_last_pass_is_back_afterwards(method_name):
    model, optimizer, batches = setting(method_name)
    for hook in (clip, replace, leave_out):
        handle = optimizer.register_step_pre_hook(hook)
        for _ in optimizer.passes():
            loss_of(model, *batches[0]).backward()
            last = [p.grad.clone() for p in model.parameters()]
        handle.remove()
        same = [p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), last, strict=True)]
        # with one pass there is one gradient, which a hook has changed: as with any torch optimizer
        assert all(same) if method_name != "base" else not all(same)


@pytest.mark.parametrize(("method_name", "form"), in_turn(METHODS, ["loop", "closure"]))
def test_a_pre_hook_that_raises_undoes_the_step(method_name, form):
    model, optimizer, batches = setting(method_name, torch.optim.AdamW, "batchnorm_cnn")
    take_step(form, model, optimizer, *batches[0])
    before = everything(model, optimizer)
    after = []

    def fail(*_):
        for p in model.parameters():
            p.data.add_(1.0)
        raise KeyError("hook")

    optimizer.register_step_post_hook(lambda *_: after.append(None))
    handle = optimizer.register_step_pre_hook(fail)
    if method_name != "base":  # of one pass there is no backup: what a hook does to the weights is done, as in torch
        with pytest.raises(KeyError, match="hook"):
            take_step(form, model, optimizer, *batches[1])
        assert_same(before, everything(model, optimizer))
        assert not after
    handle.remove()
    take_step(form, model, optimizer, *batches[1])
    assert len(after) == 1


def test_no_hook_runs_for_a_step_that_is_not_taken():
    model, optimizer, batches = setting("gam", on_nonfinite="skip")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step(lambda: (loss_of(model, *batches[0]) * float("nan")).backward())
    for _ in optimizer.passes():
        break
    assert not calls
    assert optimizer.skipped_steps == 1


class Mine(gam_fast.SAM):
    """With a step of its own, which torch wraps once more."""

    def step(self, closure=None, **options):
        return super().step(closure, **options)


@pytest.mark.parametrize("method", [gam_fast.SAM, Mine])
def test_a_hook_gets_the_arguments_of_step_and_may_not_change_them(method):
    gam_fast.SAM([nn.Parameter(torch.ones(2))], lr=0.1)  # the step of the class is wrapped already
    weight = nn.Parameter(torch.ones(2))
    optimizer = method([weight], lr=0.1)
    seen = []

    def closure():
        weight.square().sum().backward()

    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append((opt, args, kwargs)))
    optimizer.step(closure)
    assert seen == [(optimizer, (optimizer, closure), {})]
    for _ in optimizer.passes():
        closure()
    assert len(seen) == 2
    handle.remove()
    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, kwargs))
    optimizer.step(closure)
    handle.remove()
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, None), kwargs))
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match=f"pre-hook of {method.__name__} returned.*must return None"):
        optimizer.step(closure)
    assert torch.equal(weight, before)
