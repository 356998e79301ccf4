"""Rule 1: θ is restored bit for bit, whatever happens."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import ALL, DTYPES, EXACT, METHODS, WithDropout, closure_of, in_turn, loss_of, make, pairwise
from snapshots import assert_equal, assert_same, everything, unchanged
from test_active import train

import gam_fast
from gam_fast import sums

MIXED = dict.fromkeys([*in_turn(METHODS | EXACT, DTYPES), *(("gam", dtype) for dtype in DTYPES)])
PASSES = [("gam", at) for at in range(4)]
LAST = [(name, method.passes - 1) for name, method in METHODS.items() if name != "gam"]
"""How a step is undone is the engine's: in each pass of GAM, and once on the path of every other method."""

HOW = ["exception", "keyboard", "after_backward", "break", "close", "closure"]
BASES = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]


def setting(method_name, dtype=torch.float64, base=torch.optim.SGD, **options):
    method = (ALL | EXACT)[method_name]
    inner, batches = make("batchnorm_cnn", dtype)
    inner.net[0].weight.requires_grad_(False)
    inner.net[4].eval()
    model = WithDropout(inner)
    options = {"lr": 0.1, "momentum": 0.9} | options if base is torch.optim.SGD else options
    optimizer = method.optimizer(model.parameters(), base, model=model, **method.hyper, **options)
    train(model, optimizer, batches[:2])
    return model, optimizer, batches[2]


@pytest.mark.parametrize(("method_name", "dtype"), MIXED)
def test_two_hundred_steps_with_lr_zero_change_no_bit(method_name, dtype):
    method = (ALL | EXACT)[method_name]
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(37,), (5, 7), ()]]
    start = [p.detach().clone() for p in params]
    optimizer = method.optimizer(params, torch.optim.SGD, lr=0.0, momentum=0.9, weight_decay=1e-2, **method.hyper)
    moved = False
    for _ in range(200 if sums.reads_are_free(torch.device("cpu")) else 12):
        for turn in optimizer.passes():
            if turn.index:
                moved = moved or any(not torch.equal(p, s) for p, s in zip(params, start, strict=True))
            turn.backward(sum((p * p).sum() for p in params) * torch.rand((), generator=generator).to(dtype))
    assert moved == (method.passes > 1)
    assert all(map(torch.equal, params, start))


class Interruption(Exception):
    pass


@pytest.mark.parametrize(
    ("method_name", "at", "how"),
    [
        *((*of, how) for of in PASSES for how in HOW),
        *((*of, how) for of, how in in_turn(LAST, HOW)),
        *(("exact_sam", at, how) for at, how in enumerate(["keyboard", "after_backward", "break"])),
    ],
)
def test_a_step_that_is_left_leaves_no_trace_and_the_next_one_works(method_name, at, how):
    model, optimizer, (x, y) = setting(method_name)
    twins = copy.deepcopy((model, optimizer))
    before = everything(model, optimizer)
    error = KeyboardInterrupt if how == "keyboard" else Interruption

    def body(turn):
        loss = loss_of(model, x, y)
        if turn.index < at or how in ("after_backward", "close"):
            turn.backward(loss)
        if turn.index == at and how != "close":
            raise error

    if how == "close":
        turns = optimizer.passes()
        for _ in range(at + 1):
            body(next(turns))
        turns.close()
    elif how == "break":
        for turn in optimizer.passes():
            if turn.index == at:
                break
            body(turn)
    elif how == "closure":
        with pytest.raises(error):
            optimizer.step(body)
    else:
        with pytest.raises(error):  # noqa: PT012 - the loop is what is left
            for turn in optimizer.passes():
                body(turn)
    assert_same(before, everything(model, optimizer))
    check_the_next_step(model, optimizer, *twins, x, y)


def check_the_next_step(model, optimizer, twin_model, twin, x, y):
    """It does what it would have done had nothing happened."""
    rng = torch.get_rng_state()
    train(model, optimizer, [(x, y)])
    torch.set_rng_state(rng)
    train(twin_model, twin, [(x, y)])
    assert_equal(model, twin_model)


@pytest.mark.parametrize(
    ("method_name", "at", "base", "value"),
    [(*of, *others) for of, *others in pairwise(PASSES, BASES, [math.nan, math.inf])]
    + [(*of, torch.optim.SGD, math.nan) for of in LAST],
)
def test_a_gradient_that_is_not_finite_undoes_the_step(method_name, at, base, value):
    model, optimizer, (x, y) = setting(method_name, base=base)
    twins = copy.deepcopy((model, optimizer))

    def spoiled(turn):
        loss_of(model, x, y).backward()
        if turn.index == at:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[3] = value

    message = f"(pass {at}|a pass) of"
    with unchanged(model, optimizer), pytest.raises(gam_fast.NonFiniteGradientError, match=message):
        optimizer.step(spoiled)
    check_the_next_step(model, optimizer, *twins, x, y)


@pytest.mark.parametrize(("method_name", "at"), [*PASSES, ("base", 0)])
def test_skip_counts_the_step_and_goes_on(method_name, at):
    model, optimizer, (x, y) = setting(method_name, on_nonfinite="skip")
    with unchanged(model, optimizer):
        for turn in optimizer.passes():
            loss_of(model, x, y).backward()
            if turn.index == at:
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.nan)
    assert optimizer.skipped_steps == 1
    optimizer.step(closure_of(model, x, y))
    assert optimizer.skipped_steps == 1


def test_ignore_lets_a_nan_through_as_torch_does():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, on_nonfinite="ignore")
    optimizer.step(lambda: (weight * torch.tensor([1.0, math.nan])).sum().backward())
    assert weight.isnan().any()


def test_an_error_in_the_base_optimizer_restores_the_parameters():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise Interruption

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = gam_fast.SAM([weight], Failing, lr=0.1)
    with pytest.raises(Interruption):
        optimizer.step(lambda: (weight**2).sum().backward())
    assert torch.equal(weight, torch.ones(3))


def test_an_error_in_a_post_hook_keeps_the_finished_step():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1)

    def fail(*_):
        raise Interruption

    handle = optimizer.register_step_post_hook(fail)
    with pytest.raises(Interruption):
        optimizer.step(lambda: (weight**2).sum().backward())
    handle.remove()
    assert not torch.equal(weight, torch.ones(3))
    assert "momentum_buffer" in optimizer.state[weight]
    optimizer.step(lambda: (weight**2).sum().backward())


@pytest.mark.parametrize(
    ("method_name", "dtype", "threads"),
    in_turn(METHODS, [torch.float32, torch.bfloat16], [2, 2, 7, 7]),
)
def test_results_do_not_depend_on_the_number_of_threads(method_name, dtype, threads):
    method = ALL[method_name]
    shapes = [(701, 523), (90_001,)] if sums.reads_are_free(torch.device("cpu")) else [(71, 53), (9_001,)]

    def run(n):
        torch.set_num_threads(n)
        generator = torch.Generator().manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
        noise = [torch.randn(p.shape, generator=generator).to(dtype) for p in params]
        optimizer = method.optimizer(params, torch.optim.AdamW, lr=0.1, **method.hyper, clip_grad_norm=1.0)
        for _ in range(2):
            for _ in optimizer.passes():
                for p, n_ in zip(params, noise, strict=True):
                    p.grad = (p.detach() * n_).sin_()
        return params

    assert all(map(torch.equal, run(1), run(threads)))
