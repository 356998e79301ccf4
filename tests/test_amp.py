"""Gradient scalers: the same trajectory as without, overflow in any pass undone and reported, misuse in words."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref

import pytest
import torch
from cases import METHODS, closure_of, in_turn, loss_of, make, pairwise, setting, take_step
from snapshots import assert_close, assert_same, everything, unchanged
from torch import nn

import gam_fast

BASES = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]
POLICIES = ["raise", "skip", "ignore"]
SOME = ["base", "sam", "gam"]
PASSES = [(name, at) for name in SOME for at in range(METHODS[name].passes)]


def scaler_of(**options):
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, "growth_interval": 3, **options})


def with_base(method_name, base, **options):
    arguments = {"lr": 0.1, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.01, "eps": 1e-4}
    return setting(method_name, base, **arguments, **options)


def by_turn(model, optimizer, scaler, x, y):
    for turn in optimizer.passes(scaler=scaler):
        turn.backward(loss_of(model, x, y))


def by_scale(model, optimizer, scaler, x, y):
    for _ in optimizer.passes(scaler):
        scaler.scale(loss_of(model, x, y)).backward()


def by_closure(model, optimizer, scaler, x, y):
    def closure():
        loss = loss_of(model, x, y)
        scaler.scale(loss).backward()
        return loss

    returned = optimizer.step(closure, scaler=scaler)
    assert returned is None or returned < 100.0  # not scaled


def by_scaler_step(model, optimizer, scaler, x, y, known=False):
    """As frameworks do, whose own step is scaler.step(optimizer)."""
    for turn in optimizer.passes(scaler if known else None):
        scaler.scale(loss_of(model, x, y)).backward()
        if turn.last:
            scaler.step(optimizer)
            scaler.update()


def by_both(model, optimizer, scaler, x, y):
    """The scale goes down once, whoever finds the overflow."""
    by_scaler_step(model, optimizer, scaler, x, y, known=True)


FORMS = {"turn": by_turn, "scale": by_scale, "closure": by_closure, "both": by_both}
TAKEN = {**FORMS, "scaler": by_scaler_step}
"""The last finds an overflow in the last pass only."""


@pytest.mark.parametrize(("method_name", "base", "form"), pairwise(METHODS, BASES, TAKEN))
def test_the_trajectory_is_that_without_a_scaler(method_name, base, form):
    model, optimizer, batches = with_base(method_name, base)
    plain, plain_optimizer, _ = with_base(method_name, base)
    scaler = scaler_of()
    for x, y in batches:
        TAKEN[form](model, optimizer, scaler, x, y)
        plain_optimizer.step(closure_of(plain, x, y))
        assert_close(model, plain, rtol=1e-10, atol=1e-11)
        ours, theirs = ([p.grad for p in each.parameters()] for each in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)  # unscaled
    assert scaler.get_scale() == 2048.0  # grown after three steps, whatever the number of passes
    assert optimizer.skipped_steps == 0


@pytest.mark.parametrize(
    ("method_name", "at", "policy", "form"), [(*of, *others) for of, *others in pairwise(PASSES, POLICIES, FORMS)]
)
def test_overflow_in_any_pass_undoes_the_step_and_lowers_the_scale(method_name, at, policy, form):
    model, optimizer, batches = setting(method_name, model_name="batchnorm_cnn", on_nonfinite=policy)
    scaler = scaler_of()
    FORMS[form](model, optimizer, scaler, *batches[0])
    before = everything(model, optimizer)
    passes = itertools.count()

    def spoil(grad):
        torch.rand(1)  # random state is undone too
        return torch.full_like(grad, float("inf")) if next(passes) == at else grad

    first = next(model.parameters())
    handle = first.register_hook(spoil)
    FORMS[form](model, optimizer, scaler, *batches[1])
    handle.remove()
    assert_same(before, everything(model, optimizer))
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 512.0
    assert optimizer.turn is None
    FORMS[form](model, optimizer, scaler, *batches[1])
    assert optimizer.skipped_steps == 1
    assert not torch.equal(before[0]["net.0.weight"], first)


def test_clipping_is_of_the_unscaled_direction():
    model, optimizer, batches = setting("gam", clip_grad_norm=0.05)
    plain, plain_optimizer, _ = setting("gam", clip_grad_norm=0.05)
    norms = []

    def note(*_):
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))

    for hooks in (0, 1):  # which makes of the direction a gradient
        for x, y in batches:
            by_turn(model, optimizer, scaler_of(), x, y)
            plain_optimizer.step(closure_of(plain, x, y))
        assert_close(model, plain, rtol=1e-10, atol=1e-11)
        assert norms == pytest.approx([0.05] * hooks * len(batches), rel=1e-4)
        optimizer.register_step_pre_hook(note)


@pytest.mark.parametrize("options", [{}, {"sam_rho": 0.05}], ids=["two passes", "three passes"])
def test_exact_gam(options):
    (model, batches), (plain, _) = make("mlp"), make("mlp")
    optimizer, plain_optimizer = (gam_fast.ExactGAM(m.parameters(), lr=0.1, model=m, **options) for m in (model, plain))
    scaler = scaler_of()
    for x, y in batches:
        loss = optimizer.step(lambda x=x, y=y: loss_of(model, x, y), scaler=scaler)
        assert loss < 100.0
        plain_optimizer.step(lambda x=x, y=y: loss_of(plain, x, y))
        assert_close(model, plain, rtol=1e-9, atol=1e-10)
    before = everything(model, optimizer)
    optimizer.step(lambda: loss_of(model, *batches[0]) * float("inf"), scaler=scaler)
    assert_same(before, everything(model, optimizer))
    assert (optimizer.skipped_steps, scaler.get_scale()) == (1, 1024.0)


def test_a_disabled_scaler_is_no_scaler():
    scaler = scaler_of(enabled=False)
    model, optimizer, batches = setting("gam")
    plain, plain_optimizer, _ = setting("gam")
    for x, y in batches:
        by_scale(model, optimizer, scaler, x, y)
        plain_optimizer.step(closure_of(plain, x, y))
    assert_close(model, plain)
    with pytest.raises(gam_fast.NonFiniteGradientError):
        optimizer.step(lambda: (loss_of(model, x, y) * float("nan")).backward(), scaler=scaler)


def test_an_exception_leaves_the_scaler_alone():
    model, optimizer, batches = setting("gam")
    scaler = scaler_of()
    by_turn(model, optimizer, scaler, *batches[0])
    before, state = everything(model, optimizer), scaler.state_dict()

    def closure(turn):
        scaler.scale(loss_of(model, *batches[1])).backward()
        if turn.index == 2:
            raise KeyError("in pass 2")

    with pytest.raises(KeyError, match="in pass 2"):
        optimizer.step(closure, scaler=scaler)
    assert_same(before, everything(model, optimizer))
    assert scaler.state_dict() == state
    by_turn(model, optimizer, scaler, *batches[1])
    assert scaler.state_dict()["_growth_tracker"] == state["_growth_tracker"] + 1


# The scaler's own step


class SharesOverRanks(torch.amp.GradScaler):
    """As ShardedGradScaler: what another process has found counts here, whose gradients are finite."""

    def _unscale_grads_(self, *args, **kwargs):
        found = super()._unscale_grads_(*args, **kwargs)
        for value in found.values():
            value.fill_(1.0)
        return found


@pytest.mark.parametrize("known_to", ["the scaler", "the last gradient", "the first gradient"])
@pytest.mark.parametrize(("method_name", "base", "policy"), in_turn(METHODS, BASES, POLICIES))
def test_the_scalers_own_step_skips_an_overflow(method_name, base, policy, known_to):
    model, optimizer, batches = with_base(method_name, base, on_nonfinite=policy)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = everything(model, optimizer)
    scaler = (SharesOverRanks if known_to == "the scaler" else torch.amp.GradScaler)("cpu", init_scale=1024.0)
    for turn in optimizer.passes():
        infinite = {"the last gradient": turn.last, "the first gradient": turn.index == 0}.get(known_to, False)
        scaler.scale(loss_of(model, *batches[0]) * (float("inf") if infinite else 1.0)).backward()
        if turn.last:
            scaler.step(optimizer)
            scaler.update()
    assert_same(before, everything(model, optimizer))
    scheduler.step()
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 512.0
    by_scaler_step(model, optimizer, scaler_of(), *batches[0])
    assert not any(torch.equal(before[0][name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize(("scale", "fused", "policy"), pairwise([None, 8.0], [False, True], ["raise", "ignore"]))
def test_base_keeps_to_torchs_protocol_of_scalers(scale, fused, policy):
    """Torch's fused Adam is what it says: a scale is taken out, an overflow means no step."""
    ours, plain = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizers = (
        gam_fast.Base([ours], torch.optim.Adam, lr=0.1, fused=fused, on_nonfinite=policy),
        torch.optim.Adam([plain], lr=0.1, fused=True),
    )
    for overflow in (1.0, 0.0, 1.0, 0.0, None):
        for weight, optimizer in zip((ours, plain), optimizers, strict=True):
            weight.grad = torch.tensor([1.0, -3.0]) * (scale or 1.0)
            optimizer.grad_scale = None if scale is None else torch.tensor(scale)
            optimizer.found_inf = None if overflow is None else torch.tensor(overflow)
            optimizer.step()
        torch.testing.assert_close(ours, plain)
    assert optimizers[0].skipped_steps == 2
    assert torch.equal(optimizers[0].state[ours]["step"], torch.tensor(3.0))
    optimizers[0].found_inf = torch.tensor([2.0])  # found on two devices
    optimizers[0].step()
    torch.testing.assert_close(ours, plain)


# Misuse


def unscale_and_step(scaler, optimizer):
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


def step_with_a_failing_hook(scaler, optimizer):
    def hook(*_):
        handle.remove()
        raise RuntimeError("of the hook")

    handle = optimizer.register_step_pre_hook(hook)
    scaler.step(optimizer)


SCALER = torch.amp.GradScaler
MISUSES = {
    "unscaled in pass 1": (True, SCALER.unscale_, r"scaler.unscale_ was called in pass 1 of GAM.*clip_grad_norm="),
    "unscaled": (False, unscale_and_step, "scaler.unscale_ was called for one pass of GAM.*clip_grad_norm="),
    "a closure": (None, lambda s, o: s.step(o, lambda: None), r"takes no closure.*step\(closure, scaler=scaler\)"),
    "given late": (False, lambda s, o: o.step(scaler=s), r"the loop is passes\(scaler=scaler\)"),
    "no loop": (None, SCALER.step, r"GAM takes 4 passes.*GradScaler.*passes\(scaler=scaler\)"),
    "exact": (False, SCALER.step, r"step of ExactGAM.*passes\(scaler=scaler\)"),
    "a hook": (False, step_with_a_failing_hook, "of the hook"),
}
"""True if the loop is given the scaler, False if not, None if there is none; and the call in pass 1 or the last."""


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_and_forgotten(name):
    known, misuse, message = MISUSES[name]
    (model, optimizer, batches), (twin, other, _) = setting("gam"), setting("gam")
    if name == "exact":
        optimizer, other = (gam_fast.ExactGAM(m.parameters(), lr=0.1, model=m) for m in (model, twin))
    scaler = scaler_of()

    def step():
        for turn in [None] if known is None else optimizer.passes(scaler if known else None):
            loss = scaler.scale(loss_of(model, *batches[0]))
            loss.backward() if turn is None else turn.backward(loss)
            if turn is None or (turn.index == 1 if known else turn.last):
                misuse(scaler, optimizer)

    with unchanged(model, optimizer), pytest.raises(RuntimeError, match=message):
        step()
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer)) or name == "a hook"
    scaler = None  # a step without it may follow only where it is not in use any more
    by_turn(model, optimizer, None, *batches[1])
    by_turn(twin, other, None, *batches[1])
    assert_close(model, twin)


def new(weight):
    return scaler_of()


def that_stepped(weight):
    """It took a step of another model."""
    scaler = that_scaled(weight)
    scaler.step(torch.optim.SGD([weight], lr=0.1))
    scaler.update()
    return scaler


def that_scaled(weight):
    scaler = scaler_of()
    scaler.scale(weight.sum()).backward()
    return scaler


def that_unscaled(weight):
    """It has unscaled gradients of another optimizer, and waits for its update."""
    scaler = that_scaled(weight)
    scaler.unscale_(torch.optim.SGD([weight], lr=0.1))
    return scaler


@pytest.mark.parametrize(
    ("used", "method_name", "form", "unscales"),
    pairwise([new, that_stepped, that_scaled, that_unscaled], SOME, ["loop", "closure"], [False, True]),
)
def test_a_forgotten_scaler_is_noticed_whatever_it_did_before(used, method_name, form, unscales):
    model, optimizer, batches = setting(method_name)
    optimizer.step(closure_of(model, *batches[0]))
    scaler = used(nn.Parameter(torch.ones(2)))
    before = everything(model, optimizer)

    def closure():
        scaler.scale(loss_of(model, *batches[0])).backward()
        if unscales and optimizer.turn.last and method_name != "base":  # where nothing is wrong with that
            scaler.unscale_(optimizer)

    message = r"a loss was scaled in a step by a GradScaler that the step was not given.*passes\(scaler=scaler\)"
    with pytest.raises(RuntimeError, match=message):
        take_step(optimizer, closure, form)
    assert_same(before, everything(model, optimizer))
    optimizer.step(closure_of(model, *batches[0]))


def test_a_forgotten_scaler_is_noticed_where_its_steps_overflow():
    model, optimizer, batches = setting("gam", on_nonfinite="skip")
    scaler = scaler_of()

    def closure():
        (scaler.scale(loss_of(model, *batches[0])) * float("inf")).backward()

    optimizer.step(closure)
    assert optimizer.skipped_steps == 1
    with pytest.raises(RuntimeError, match="a loss was scaled in a step by a GradScaler"):
        optimizer.step(closure)
    assert optimizer.skipped_steps == 1
    with unchanged(model, optimizer), pytest.raises(RuntimeError, match="a loss was scaled in a step by a GradScaler"):
        _ = [closure() for _ in optimizer.passes()]  # a loop waits for scaler.step(optimizer)
    assert optimizer.skipped_steps == 1


def test_a_pending_scaler_of_something_else_puts_off_no_check():
    model, optimizer, batches = setting("sam", on_nonfinite="skip")
    pending, passes = that_scaled(nn.Parameter(torch.ones(2))), 0
    for turn in optimizer.passes():
        passes = turn.index + 1
        (loss_of(model, *batches[0]) * float("inf")).backward()
    assert (passes, optimizer.skipped_steps) == (1, 1)
    assert pending.get_scale() > 0


@pytest.mark.parametrize(("method_name", "at"), PASSES)
def test_a_loss_that_is_not_scaled_is_an_error_in_any_pass_of_any_step(method_name, at):
    model, optimizer, batches = setting(method_name)
    scaler = scaler_of()
    by_scale(model, optimizer, scaler, *batches[0])

    def closure(turn):
        loss = loss_of(model, *batches[0])
        (loss if turn.index == at else scaler.scale(loss)).backward()

    with unchanged(model, optimizer), pytest.raises(RuntimeError, match=f"no loss was scaled in pass {at} of"):
        optimizer.step(closure, scaler=scaler)
    by_scale(model, optimizer, scaler, *batches[0])


def test_scalers_of_something_else_are_no_matter():
    """One that is disabled, one with its own optimizer within the body, one of before, one of another thread."""
    model, optimizer, batches = setting("sam")
    other = nn.Parameter(torch.ones(2))
    others = torch.optim.SGD([other], lr=0.1)
    disabled, own, elsewhere = scaler_of(enabled=False), scaler_of(), scaler_of()
    used = that_scaled(other)
    for turn in optimizer.passes():
        disabled.scale(loss_of(model, *batches[0])).backward()
        thread = threading.Thread(target=elsewhere.scale, args=(torch.ones(()),))
        thread.start()
        thread.join()
        if turn.last:
            own.scale(other.sum()).backward()
            own.step(others)
            own.update()
    twin, plain, _ = setting("sam")
    plain.step(closure_of(twin, *batches[0]))
    assert_close(model, twin)
    found = weakref.ref(used)
    del used
    gc.collect()
    assert found() is None  # it is not kept alive
