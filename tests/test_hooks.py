"""Step hooks: in each form they find the final direction in ``param.grad``, as with torch's optimizers."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from cases import METHODS, closure_of, loss_of, make
from snapshots import assert_same, everything
from test_trajectories import reference_step
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gam_fast

BASES = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, alpha=0.9, eps=1e-4),
}


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


def add(optimizer, args, kwargs):
    """A gradient for those without one, too."""
    for i, p in enumerate(parameters_of(optimizer)):
        if p.requires_grad:
            p.grad = torch.full_like(p, 0.1 * i) if p.grad is None else p.grad + 0.1 * i


def shrink(optimizer, args, kwargs):
    """The weights themselves."""
    with torch.no_grad():
        for p in parameters_of(optimizer):
            p.mul_(0.9)


HOOKS = {hook.__name__: hook for hook in (clip, replace, leave_out, shrink)}


def take_step(form, model, optimizer, x, y):
    if form == "closure":
        optimizer.step(closure_of(model, x, y))
        return
    for turn in optimizer.passes():
        loss_of(model, x, y).backward()
        if form == "step in the last pass" and turn.last:
            optimizer.step()


FORMS = ["loop", "closure", "step in the last pass"]


@pytest.mark.parametrize("base_name", BASES)
@pytest.mark.parametrize("method_name", METHODS)
def test_a_pre_hook_works_on_the_final_direction(method_name, base_name):
    """Torch's own optimizer with the same hook, and the direction by the book as its gradient, is the oracle."""
    method, build = METHODS[method_name], BASES[base_name]
    for hook in HOOKS.values():
        ours, batches = make("mlp")
        theirs = copy.deepcopy(ours)
        optimizer = method.optimizer(ours.parameters(), build, model=ours, **method.hyper)
        plain = build(theirs.parameters())
        for each in (optimizer, plain):
            each.register_step_pre_hook(hook)
        for form, (x, y) in zip(FORMS, batches, strict=False):
            take_step(form, ours, optimizer, x, y)
            reference_step(theirs, plain, method, method.hyper, x, y)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
            assert optimizer.state[p].keys() == plain.state[q].keys()


@pytest.mark.parametrize("where", ["optimizer", "base", "everywhere"])
@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_a_hook_may_give_a_gradient_to_a_parameter_without_one(method_name, where):
    method = METHODS[method_name]
    ours, batches = make("partly_used")
    theirs = copy.deepcopy(ours)
    optimizer = method.optimizer(ours.parameters(), torch.optim.SGD, lr=0.1, **method.hyper)
    plain = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.1)
    trained = [p for p in ours.parameters() if p.requires_grad]
    of = {"optimizer": optimizer, "base": optimizer.base}
    ours_add = lambda *_: add(torch.optim.SGD(trained), (), {})  # noqa: E731 - those that are trained have other numbers
    register = of[where].register_step_pre_hook if where in of else register_optimizer_step_pre_hook
    plain.register_step_pre_hook(add)
    for x, y in batches[:2]:
        handle = register(ours_add)
        take_step("loop", ours, optimizer, x, y)
        handle.remove()
        reference_step(theirs, plain, method, method.hyper, x, y)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method_name", METHODS)
def test_a_hook_that_only_looks_changes_nothing(method_name, dtype):
    method = METHODS[method_name]
    one, batches = make("mlp", dtype)
    two = copy.deepcopy(one)
    plain, watched = (
        method.optimizer(model.parameters(), torch.optim.AdamW, clip_grad_norm=0.1, **method.hyper)
        for model in (one, two)
    )
    dtypes = set()
    watched.register_step_pre_hook(lambda *_: dtypes.update(p.grad.dtype for p in two.parameters()))
    for x, y in batches:
        take_step("loop", one, plain, x, y)
        take_step("closure", two, watched, x, y)
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0.02 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
    assert dtypes == {dtype}


@pytest.mark.parametrize("method_name", METHODS)
def test_the_gradient_of_the_last_pass_is_back_afterwards(method_name):
    method = METHODS[method_name]
    model, batches = make("mlp")
    optimizer = method.optimizer(model.parameters(), torch.optim.SGD, lr=0.1, **method.hyper)
    optimizer.register_step_pre_hook(clip)
    for hook in (clip, replace, leave_out):
        handle = optimizer.register_step_pre_hook(hook)
        for _ in optimizer.passes():
            loss_of(model, *batches[0]).backward()
            last = [p.grad.clone() for p in model.parameters()]
        handle.remove()
        same = [p.grad is not None and torch.equal(p.grad, g) for p, g in zip(model.parameters(), last, strict=True)]
        # with one pass there is one gradient, which a hook has changed: as with any torch optimizer
        assert all(same) if method.passes > 1 else not any(same)


@pytest.mark.parametrize("form", ["loop", "closure"])
@pytest.mark.parametrize("method_name", METHODS)
def test_a_pre_hook_that_raises_undoes_the_step(method_name, form):
    method = METHODS[method_name]
    model, batches = make("batchnorm_cnn")
    optimizer = method.optimizer(model.parameters(), torch.optim.AdamW, model=model, **method.hyper)
    take_step(form, model, optimizer, *batches[0])
    before = everything(model, optimizer)
    after = []

    def fail(*_):
        for p in model.parameters():
            p.data.add_(1.0)
        raise KeyError("hook")

    optimizer.register_step_post_hook(lambda *_: after.append(None))
    handle = optimizer.register_step_pre_hook(fail)
    if method.passes > 1:  # of one pass there is no backup: what a hook does to the weights is done, as in torch
        with pytest.raises(KeyError, match="hook"):
            take_step(form, model, optimizer, *batches[1])
        assert_same(before, everything(model, optimizer))
        assert not after
    handle.remove()
    take_step(form, model, optimizer, *batches[1])
    assert len(after) == 1


def test_no_hook_runs_for_a_step_that_is_not_taken():
    model, batches = make("mlp")
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, on_nonfinite="skip")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step(lambda: (loss_of(model, *batches[0]) * float("nan")).backward())
    for _ in optimizer.passes():
        break
    assert not calls
    assert optimizer.skipped_steps == 1


def test_a_hook_gets_the_arguments_of_step_and_may_not_change_them():
    weight = nn.Parameter(torch.ones(2))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    seen = []

    def closure():
        weight.square().sum().backward()

    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append((opt, args, kwargs)))
    optimizer.step(closure)
    assert seen == [(optimizer, (optimizer, closure), {})]
    handle.remove()
    handle = optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args, kwargs))
    optimizer.step(closure)
    handle.remove()
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, None), kwargs))
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="pre-hook of SAM returned.*must return None"):
        optimizer.step(closure)
    assert torch.equal(weight, before)


def test_a_subclass_with_a_step_of_its_own_has_its_hooks_once():
    class Mine(gam_fast.SAM):
        def step(self, closure=None, **options):
            return super().step(closure, **options)

    weight = nn.Parameter(torch.ones(2))
    calls = []
    for cls in (gam_fast.SAM, Mine):
        optimizer = cls([weight], torch.optim.SGD, lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step(lambda: weight.square().sum().backward())
    for _ in optimizer.passes():
        weight.square().sum().backward()
    assert calls == ["pre", "post"] * 2
