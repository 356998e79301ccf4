"""Gradient scalers: the same trajectory as without, overflow in any pass undone and reported, misuse in words."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import reference
import torch
from cases import METHODS, closure_of, loss_of, make, pairwise
from snapshots import assert_same, everything
from torch import nn

import gam_fast

BASES = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]
POLICIES = ["raise", "skip", "ignore"]
PASSES = [(name, at) for name in ("base", "sam", "gam") for at in range(METHODS[name].passes)]


def scaler_of(**options):
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, "growth_interval": 3, **options})


def setting(method_name="gam", dtype=torch.float64, base=torch.optim.SGD, model_name="mlp", **options):
    method = METHODS[method_name]
    model, batches = make(model_name, dtype)
    arguments = {"lr": 0.1, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.01, "eps": 1e-4}
    return (
        model,
        method.optimizer(model.parameters(), base, model=model, **arguments, **method.hyper, **options),
        batches,
    )


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


FORMS = {"turn": by_turn, "scale": by_scale, "closure": by_closure}


@pytest.mark.parametrize(("method_name", "base", "form"), pairwise(METHODS, BASES, FORMS))
def test_the_trajectory_is_that_without_a_scaler(method_name, base, form):
    model, optimizer, batches = setting(method_name, base=base)
    plain, plain_optimizer, _ = setting(method_name, base=base)
    scaler = scaler_of()
    for x, y in batches:
        FORMS[form](model, optimizer, scaler, x, y)
        plain_optimizer.step(closure_of(plain, x, y))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-9)  # unscaled
    assert scaler.get_scale() == 2048.0  # grown after three steps, whatever the number of passes
    assert optimizer.skipped_steps == 0


def sam_by_hand(model, base, scaler, x, y, rho):
    """SAM with a scaler as one writes it by torch's own means: every gradient is unscaled by hand."""
    params = list(model.parameters())

    def gradient():
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, x, y)
        scaled = torch.autograd.grad(loss * scaler.get_scale(), params)
        return [g / scaler.get_scale() for g in scaled]

    start = [p.detach().clone() for p in params]

    def at(theta):
        with torch.no_grad():
            for p, value in zip(params, theta, strict=True):
                p.copy_(value)
        return gradient()

    direction = reference.sam(at, start, rho=rho)
    with torch.no_grad():
        for p, value, d in zip(params, start, direction, strict=True):
            p.copy_(value)
            p.grad = d
    base.step()


def test_fp16_autocast_against_a_loop_by_hand():
    model, batches = make("mlp", torch.float32)
    plain = copy.deepcopy(model)
    optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1)
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    scaler = scaler_of(growth_interval=1000)
    for x, y in batches:
        for turn in optimizer.passes(scaler=scaler):
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, x, y)
            turn.backward(loss)
        sam_by_hand(plain, base, scaler, x, y, rho=0.1)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_small_gradients_survive_half_precision_only_with_a_scaler():
    def gradients(scaler):
        model, batches = make("mlp", torch.float32)
        optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.1)
        x, _ = batches[0]
        for turn in optimizer.passes(scaler=scaler):
            with torch.autocast("cpu", torch.float16):
                out = model(x)
            turn.backward(out.float().square().mean() * 1e-7)
        return [p.grad.clone() for p in model.parameters()]

    model, batches = make("mlp", torch.float32)
    (model(batches[0][0]).square().mean() * 1e-7).backward()
    size = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    kept = sum(g.square().sum() for g in gradients(scaler_of(init_scale=2.0**20))).sqrt()
    lost = sum(g.square().sum() for g in gradients(None)).sqrt()
    assert 0.8 < kept / size < 1.3
    assert lost / size < 0.8


@pytest.mark.parametrize(
    ("method_name", "at", "policy", "form"), [(*of, *others) for of, *others in pairwise(PASSES, POLICIES, FORMS)]
)
def test_overflow_in_any_pass_undoes_the_step_and_lowers_the_scale(method_name, at, policy, form):
    model, optimizer, batches = setting(method_name, model_name="batchnorm_cnn", on_nonfinite=policy)
    scaler = scaler_of()
    FORMS[form](model, optimizer, scaler, *batches[0])
    before = everything(model, optimizer)
    passes = []

    def spoil(grad):
        passes.append(None)
        torch.rand(1)  # random state is undone too
        return torch.full_like(grad, float("inf")) if len(passes) - 1 == at else grad

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


def test_a_scale_that_is_too_large_finds_its_way_down():
    model, batches = make("mlp", torch.float32)
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    scaler = scaler_of(init_scale=2.0**40, growth_interval=1000)
    losses = []
    for _ in range(60):
        for turn in optimizer.passes(scaler=scaler):
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, *batches[0])
            turn.backward(loss)
            if turn.index == 0:
                losses.append(loss.item())
    assert 5 < optimizer.skipped_steps < 40
    assert scaler.get_scale() == 2.0 ** (40 - optimizer.skipped_steps)
    assert losses[-1] < losses[0]


def test_clipping_is_of_the_unscaled_direction():
    model, optimizer, batches = setting(clip_grad_norm=0.05)
    plain, plain_optimizer, _ = setting(clip_grad_norm=0.05)
    for x, y in batches:
        by_turn(model, optimizer, scaler_of(), x, y)
        plain_optimizer.step(closure_of(plain, x, y))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("sam_rho", [None, 0.05])
def test_exact_gam(sam_rho):
    def made():
        model, batches = make("mlp")
        options = {} if sam_rho is None else {"sam_rho": sam_rho}
        return model, gam_fast.ExactGAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model, **options), batches

    (model, optimizer, batches), (plain, plain_optimizer, _) = made(), made()
    scaler = scaler_of()
    for x, y in batches:
        loss = optimizer.step(lambda x=x, y=y: loss_of(model, x, y), scaler=scaler)
        assert loss < 100.0
        plain_optimizer.step(lambda x=x, y=y: loss_of(plain, x, y))
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    before = everything(model, optimizer)
    optimizer.step(lambda: loss_of(model, *batches[0]) * float("inf"), scaler=scaler)
    assert_same(before, everything(model, optimizer))
    assert (optimizer.skipped_steps, scaler.get_scale()) == (1, 1024.0)


def test_a_disabled_scaler_is_no_scaler():
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model, optimizer, batches = setting()
    plain, plain_optimizer, _ = setting()
    for x, y in batches:
        by_scale(model, optimizer, scaler, x, y)
        plain_optimizer.step(closure_of(plain, x, y))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(gam_fast.NonFiniteGradientError):
        optimizer.step(lambda: (loss_of(model, x, y) * float("nan")).backward(), scaler=scaler)


def test_an_exception_leaves_the_scaler_alone():
    model, optimizer, batches = setting()
    scaler = scaler_of()
    by_turn(model, optimizer, scaler, *batches[0])
    before, state = everything(model, optimizer), scaler.state_dict()

    def raising():
        for turn in optimizer.passes(scaler=scaler):
            turn.backward(loss_of(model, *batches[1]))
            if turn.index == 2:
                raise KeyError("in pass 2")

    with pytest.raises(KeyError, match="in pass 2"):
        raising()
    assert_same(before, everything(model, optimizer))
    assert scaler.state_dict() == state
    by_turn(model, optimizer, scaler, *batches[1])
    assert scaler.state_dict()["_growth_tracker"] == state["_growth_tracker"] + 1


def misused(model, optimizer, scaler, how, batch):
    for turn in optimizer.passes(scaler=scaler):
        loss = loss_of(model, *batch)
        if how == "not scaled":
            loss.backward()
            continue
        turn.backward(loss)
        if turn.index == 1 and how == "unscaled":
            scaler.unscale_(optimizer)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("not scaled", r"no loss was scaled in pass 0 of GAM: call turn.backward\(loss\)"),
        ("unscaled", r"scaler.unscale_ was called in pass 1 of GAM.*clip_grad_norm="),
    ],
)
def test_misuse_of_the_scaler_is_refused(how, message):
    model, optimizer, batches = setting()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        misused(model, optimizer, scaler_of(), how, batches[0])
    assert_same(before, everything(model, optimizer))


def by_scaler_step(model, optimizer, scaler, x, y):
    """As frameworks do, whose own step is scaler.step(optimizer)."""
    for turn in optimizer.passes():
        scaler.scale(loss_of(model, x, y)).backward()
        if turn.last:
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method_name", METHODS)
def test_the_scalers_own_step_in_the_last_pass(method_name, base):
    model, optimizer, batches = setting(method_name, base=base)
    twin, twin_optimizer, _ = setting(method_name, base=base)
    scaler, other = scaler_of(), scaler_of()
    for x, y in batches:
        by_scaler_step(model, optimizer, scaler, x, y)
        by_turn(twin, twin_optimizer, other, x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert scaler.state_dict() == other.state_dict()
    assert scaler.get_scale() > 1024.0


def test_the_scalers_own_step_skips_an_overflow():
    model, optimizer, batches = setting()
    scaler = scaler_of()
    before = everything(model, optimizer)
    for turn in optimizer.passes():
        loss = loss_of(model, *batches[0])
        scaler.scale(loss * float("inf") if turn.last else loss).backward()
        if turn.last:
            scaler.step(optimizer)
            scaler.update()
    assert_same(before, everything(model, optimizer))
    assert scaler.get_scale() == 512.0
    assert optimizer.skipped_steps == 1
    by_scaler_step(model, optimizer, scaler, *batches[0])
    assert not any(torch.equal(before[0][name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("method_name", "at"), PASSES)
def test_the_scalers_own_step_where_passes_know_it_skips_an_overflow_in_any_pass(method_name, at, policy):
    """Frameworks step and update; the scale goes down once, whoever finds the overflow."""
    model, optimizer, batches = setting(method_name, on_nonfinite=policy)
    scaler = scaler_of()

    def step(x, y, at=None):
        for turn in optimizer.passes(scaler):
            scaler.scale(loss_of(model, x, y) * (float("inf") if turn.index == at else 1.0)).backward()
            if turn.last:
                scaler.step(optimizer)
                scaler.update()

    step(*batches[0])
    before = everything(model, optimizer)
    step(*batches[1], at=at)
    assert_same(before, everything(model, optimizer))
    assert (scaler.get_scale(), optimizer.skipped_steps) == (512.0, 1)
    step(*batches[1])
    twin, other, _ = setting(method_name)
    for x, y in batches[:2]:
        other.step(closure_of(twin, x, y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def with_unscaled_gradients(model, optimizer, scaler, batch):
    for turn in optimizer.passes():
        scaler.scale(loss_of(model, *batch)).backward()
        if turn.last:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)


def with_a_closure(model, optimizer, scaler, batch):
    scaler.scale(loss_of(model, *batch)).backward()
    scaler.step(optimizer, lambda: scaler.scale(loss_of(model, *batch)).backward())


def with_the_scaler_in_the_last_pass(model, optimizer, scaler, batch):
    for turn in optimizer.passes():
        scaler.scale(loss_of(model, *batch)).backward()
        if turn.last:
            optimizer.step(scaler=scaler)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (with_unscaled_gradients, "scaler.unscale_ was called for one pass of GAM.*clip_grad_norm="),
        (with_a_closure, r"takes no closure.*step\(closure, scaler=scaler\)"),
        (with_the_scaler_in_the_last_pass, r"the loop is passes\(scaler=scaler\)"),
    ],
)
def test_misuse_of_the_scalers_own_step_is_refused(misuse, message):
    model, optimizer, batches = setting()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=message):
        misuse(model, optimizer, scaler_of(), batches[0])
    assert_same(before, everything(model, optimizer))
    assert not {"grad_scale", "found_inf"} & set(vars(optimizer))
    by_scaler_step(model, optimizer, scaler_of(), *batches[0])


def test_the_scalers_own_step_is_not_for_the_exact_form():
    model, batches = make("mlp")
    optimizer = gam_fast.ExactGAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = everything(model, optimizer)
    scaler = scaler_of()

    def step():
        for turn in optimizer.passes():
            turn.backward(scaler.scale(loss_of(model, *batches[0])))
            if turn.last:
                scaler.step(optimizer)

    with pytest.raises(RuntimeError, match=r"step of ExactGAM.*passes\(scaler=scaler\)"):
        step()
    assert_same(before, everything(model, optimizer))


def test_a_scale_left_behind_by_a_hook_that_raises_is_forgotten():
    model, optimizer, batches = setting()
    twin, other, _ = setting()
    scaler = scaler_of()

    def raising(*_):
        raise KeyError("hook")

    def step():
        for turn in optimizer.passes():
            scaler.scale(loss_of(model, *batches[0])).backward()
            if turn.last:
                scaler.step(optimizer)

    handle = optimizer.register_step_pre_hook(raising)
    with pytest.raises(KeyError, match="hook"):
        step()
    handle.remove()
    for p in (optimizer, other):
        m = model if p is optimizer else twin
        for turn in p.passes():
            turn.backward(loss_of(m, *batches[1]))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("where", ["passes", "closure"])
def test_autocast_around_the_step_sees_the_weights_of_each_pass(where):
    """Its cache of converted weights lives as long as the outermost autocast."""
    found = []
    for around in (False, True):
        model, batches = make("mlp", torch.float32)
        optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.2, rho=0.5, model=model)

        def loss(model=model, batch=batches[0]):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss_of(model, *batch)
            value.backward()
            return value

        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            for _ in range(3):
                if where == "closure":
                    optimizer.step(loss)
                else:
                    for _turn in optimizer.passes():
                        loss()
        found.append(list(model.parameters()))
    for p, q in zip(*found, strict=True):
        assert torch.equal(p, q)


def test_the_scalers_own_step_says_what_to_do():
    model, optimizer, batches = setting()
    scaler = scaler_of()
    scaler.scale(loss_of(model, *batches[0])).backward()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"GAM takes 4 passes.*GradScaler.*passes\(scaler=scaler\)"):
        scaler.step(optimizer)
    assert_same(before, everything(model, optimizer))


@pytest.mark.parametrize("by_loop", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_the_scalers_own_step_serves_a_method_of_one_pass(unscale, by_loop):
    model, optimizer, batches = setting("base")
    plain, plain_optimizer, _ = setting("base")
    scaler = scaler_of()
    for x, y in batches:
        optimizer.zero_grad()
        for _ in optimizer.passes() if by_loop else [None]:
            scaler.scale(loss_of(model, x, y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        plain_optimizer.step(closure_of(plain, x, y))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaler", [3, "cpu", nn.Linear(1, 1)])
def test_what_is_no_scaler_is_refused(scaler):
    _, optimizer, _ = setting()
    with pytest.raises(TypeError, match="scaler must be a torch.amp.GradScaler or None, got"):
        optimizer.passes(scaler=scaler)
    with pytest.raises(TypeError, match="scaler must be a torch.amp.GradScaler or None, got"):
        optimizer.step(lambda: None, scaler=scaler)


def test_bf16_autocast_needs_nothing():
    model, batches = make("mlp", torch.float32)
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.2, momentum=0.9, model=model)
    losses = []
    for _ in range(20):
        for turn in optimizer.passes():
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, *batches[0])
            turn.backward(loss)
            if turn.index == 0:
                losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_two_optimizers_share_a_scaler():
    one, first, batches = setting("sam")
    two, second, _ = setting("gam")
    scaler = scaler_of(growth_interval=2)
    by_turn(one, first, scaler, *batches[0])
    by_turn(two, second, scaler, *batches[0])
    assert scaler.get_scale() == 2048.0


class SharesOverRanks(torch.amp.GradScaler):
    """As ShardedGradScaler: what another process has found counts here, whose gradients are finite."""

    def _unscale_grads_(self, *args, **kwargs):
        found = super()._unscale_grads_(*args, **kwargs)
        for value in found.values():
            value.fill_(1.0)
        return found


@pytest.mark.parametrize(("method_name", "base", "policy"), pairwise(METHODS, BASES[::2], POLICIES))
def test_an_overflow_that_only_the_scaler_knows_of_skips_the_step(method_name, base, policy):
    model, optimizer, batches = setting(method_name, base=base, on_nonfinite=policy)
    scaler = SharesOverRanks("cpu", init_scale=1024.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    before = everything(model, optimizer)
    by_scaler_step(model, optimizer, scaler, *batches[0])
    assert_same(before, everything(model, optimizer))
    scheduler.step()
    assert optimizer.skipped_steps == 1
    assert scaler.get_scale() == 512.0
    by_scaler_step(model, optimizer, scaler_of(), *batches[0])
    assert not any(torch.equal(before[0][name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("policy", ["raise", "ignore"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [None, 8.0])
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


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("form", ["loop", "closure"])
@pytest.mark.parametrize("method_name", METHODS)
def test_a_scaler_that_has_scaled_and_was_not_given_is_an_error(method_name, form, unscales):
    if unscales and METHODS[method_name].passes == 1:
        return  # nothing is wrong with that
    model, optimizer, batches = setting(method_name)
    scaler = scaler_of()
    before = everything(model, optimizer)

    def closure():
        scaler.scale(loss_of(model, *batches[0])).backward()
        if unscales and optimizer.turn.last:
            scaler.unscale_(optimizer)

    def step():
        if form == "closure":
            optimizer.step(closure)
        else:
            for _ in optimizer.passes():
                closure()

    with pytest.raises(RuntimeError, match=r"a loss was scaled in a step by a GradScaler.*passes\(scaler=scaler\)"):
        step()
    assert_same(before, everything(model, optimizer))


def test_a_forgotten_scaler_is_noticed_where_its_steps_overflow():
    model, optimizer, batches = setting("gam", on_nonfinite="skip")
    scaler = scaler_of()

    def step():
        for _ in optimizer.passes():
            (scaler.scale(loss_of(model, *batches[0])) * float("inf")).backward()

    step()
    assert optimizer.skipped_steps == 1
    with pytest.raises(RuntimeError, match="a loss was scaled in a step by a GradScaler"):
        step()
    assert optimizer.skipped_steps == 1
    by_turn(model, optimizer, scaler, *batches[0])


def test_scalers_of_something_else_are_no_matter():
    """One that is disabled, one that has its own optimizer within the body, one that was used before."""
    model, optimizer, batches = setting("sam")
    other = nn.Parameter(torch.ones(2))
    others = torch.optim.SGD([other], lr=0.1)
    disabled, own, used = scaler_of(enabled=False), scaler_of(), scaler_of()
    used.scale(torch.ones(()))
    for turn in optimizer.passes():
        disabled.scale(loss_of(model, *batches[0])).backward()
        if turn.last:
            own.scale(other.sum()).backward()
            own.step(others)
            own.update()
    twin, plain, _ = setting("sam")
    plain.step(closure_of(twin, *batches[0]))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def by_twin():
    """A scaler that another model used before."""
    scaler, weight = scaler_of(), nn.Parameter(torch.ones(2))
    used = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(weight.sum()).backward()
    scaler.step(used)
    scaler.update()
    return scaler


def by_scaling():
    """A scaler that has scaled something."""
    scaler = scaler_of()
    scaler.scale(torch.ones(()))
    return scaler


def by_another_optimizer():
    """A scaler that has unscaled gradients of another optimizer, and waits for its update."""
    scaler, weight = scaler_of(), nn.Parameter(torch.ones(2))
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(torch.optim.SGD([weight], lr=0.1))
    return scaler


@pytest.mark.parametrize("used", [scaler_of, by_twin, by_scaling, by_another_optimizer])
@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_a_forgotten_scaler_is_noticed_whatever_it_did_before(method_name, used):
    model, optimizer, batches = setting(method_name)
    optimizer.step(closure_of(model, *batches[0]))
    scaler = used()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="a loss was scaled in a step by a GradScaler that the step was not given"):
        optimizer.step(lambda: scaler.scale(loss_of(model, *batches[0])).backward())
    assert_same(before, everything(model, optimizer))
    optimizer.step(closure_of(model, *batches[0]))


@pytest.mark.parametrize(("method_name", "at"), PASSES)
def test_a_loss_that_is_not_scaled_is_an_error_in_any_pass_of_any_step(method_name, at):
    model, optimizer, batches = setting(method_name)
    scaler = scaler_of()
    by_scale(model, optimizer, scaler, *batches[0])
    before = everything(model, optimizer)

    def closure(turn):
        loss = loss_of(model, *batches[0])
        (loss if turn.index == at else scaler.scale(loss)).backward()

    with pytest.raises(RuntimeError, match=f"no loss was scaled in pass {at} of"):
        optimizer.step(closure, scaler=scaler)
    assert_same(before, everything(model, optimizer))
    by_scale(model, optimizer, scaler, *batches[0])


def test_a_thread_that_scales_is_no_matter_of_a_step_in_another():
    model, optimizer, batches = setting("sam")
    scaler = scaler_of()
    for _ in optimizer.passes():
        loss_of(model, *batches[0]).backward()
        thread = threading.Thread(target=scaler.scale, args=(torch.ones(()),))
        thread.start()
        thread.join()


def test_a_scaler_is_not_kept_alive():
    scaler = scaler_of()
    scaler.scale(torch.ones(()))
    found = weakref.ref(scaler)
    del scaler
    gc.collect()
    assert found() is None
