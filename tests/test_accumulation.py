"""Micro-batches: the same ones in each pass, adding up to the step of the large batch."""

from __future__ import annotations

import copy
import itertools
import weakref

import pytest
import torch
from cases import ALL, FORMS, METHODS, closure_of, in_turn, loss_of, make, pairwise, setting, take_step
from snapshots import assert_close
from torch import nn

import gam_fast

SOME = ["base", "sam", "gam"]
GIVEN = ["list", "iterator", "closure", "scaler"]


def parts_of(x, y, count=4):
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


@pytest.mark.parametrize(
    ("method_name", "given"), [*in_turn(METHODS, GIVEN), *in_turn(["gam"], ["list", "closure", "scaler"])]
)
def test_micro_batches_take_the_step_of_the_large_batch(method_name, given):
    (whole, large, batches), (model, small, _) = setting(method_name), setting(method_name)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if given == "scaler" else None
    loader = iter([part for x, y in batches for part in parts_of(x, y)])
    for x, y in batches:
        large.step(closure_of(whole, x, y))
        source = parts_of(x, y) if given in ("list", "closure") else itertools.islice(loader, 4)

        def body(turn, source=source):
            for a, b in small.micro_batches(source):
                turn.backward(loss_of(model, a, b) / 4)

        take_step(small, body, given, scaler=scaler)
    assert_close(whole, model, rtol=1e-10, atol=1e-10)
    if given in ("iterator", "scaler"):
        assert next(loader, None) is None  # each was read once


def test_each_micro_batch_has_masks_of_its_own_the_same_in_every_pass():
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1)).double()
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, rho_prime=0.0)
    masks = []
    for _ in optimizer.passes():
        for x in optimizer.micro_batches([torch.ones(1, 4, dtype=torch.float64)] * 3):
            hidden = model[1](torch.ones(1, 16))
            masks.append(hidden.flatten().tolist())
            model(x).sum().backward()
    passes = [masks[3 * i : 3 * i + 3] for i in range(4)]
    assert all(one == passes[0] for one in passes)
    assert passes[0][0] != passes[0][1]


def test_running_statistics_move_once_for_each_micro_batch():
    (model, optimizer, batches), (plain, _) = setting("gam", model_name="batchnorm_cnn"), make("batchnorm_cnn")
    parts = parts_of(*batches[0], 3)
    for _ in optimizer.passes():
        for x, y in optimizer.micro_batches(parts):
            loss_of(model, x, y).backward()
    for x, _ in parts:
        plain(x)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_micro_batches_are_not_held_after_the_step():
    model, optimizer, batches = setting("gam")
    x, y = (t.clone() for t in batches[0])
    held = weakref.ref(x)
    turns = optimizer.passes()
    for turn in turns:
        for a, b in optimizer.micro_batches([(x, y)]):
            turn.backward(loss_of(model, a, b))
        if turn.last:
            optimizer.step()
            break
    del x, y, a, b
    assert held() is None
    turns.close()


def test_outside_a_step_micro_batches_say_where_they_belong():
    weight = nn.Parameter(torch.ones(2))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match=r"micro_batches\(\) outside a step: iterate over it in the body of"):
        optimizer.micro_batches([1])


def empty(model, optimizer, batch):
    for x in optimizer.micro_batches(iter(())):
        model(x).sum().backward()


def step_in_each_pass(model, optimizer, batch):
    loss_of(model, *batch).backward()
    optimizer.step()


def nan_in_the_last_pass(model, optimizer, batch):
    (loss_of(model, *batch) * (float("nan") if optimizer.turn.last else 1.0)).backward()
    if optimizer.turn.last:
        optimizer.step()


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (empty, ValueError, "micro_batches.. got none: the loader is at its end"),
        (step_in_each_pass, RuntimeError, r"this SAM is in progress: the loop .* takes the step"),
        (nan_in_the_last_pass, gam_fast.NonFiniteGradientError, "pass"),
        (nan_in_the_last_pass, None, ""),
    ],
    ids=["empty", "step in each pass", "nan", "nan, skipped"],
)
def test_an_error_in_the_body_undoes_the_step(body, error, message):
    model, optimizer, batches = setting("sam", on_nonfinite="raise" if error else "skip")
    before = copy.deepcopy(model)

    def step():
        for _ in optimizer.passes():
            body(model, optimizer, batches[0])

    if error is None:
        step()
    else:
        with pytest.raises(error, match=message):
            step()
    assert optimizer.skipped_steps == (error is None)
    assert_close(model, before)
    assert optimizer.turn is None
    optimizer.step(closure_of(model, *batches[0]))


def plain_or_inactive(method_name, params, **options):
    """A step of one pass: the base optimizer alone, as a method and as an inactive step of another."""
    method = ALL[method_name]
    interval = 1 if method.passes == 1 else float("inf")
    return method.optimizer(params, torch.optim.SGD, interval=interval, **options, **method.hyper)


@pytest.mark.parametrize(("method_name", "form", "share"), pairwise(SOME, FORMS, [1.0, 0.5]))
def test_where_one_pass_is_all_each_micro_batch_is_read_when_it_is_used(method_name, form, share):
    weight = nn.Parameter(torch.ones(1))
    optimizer = plain_or_inactive(method_name, [weight], ascent_share=share, lr=0.125)
    held, log = [], []

    def read():
        for i in range(3):
            log.append(("read", i))
            batch = torch.ones(1)
            held.append(weakref.ref(batch))
            yield batch
            del batch

    def body():
        for i, batch in enumerate(optimizer.micro_batches(read())):
            log.append(("use", i))
            assert [r() is not None for r in held] == [j == i for j in range(i + 1)]
            (batch * weight).sum().backward()
            del batch

    take_step(optimizer, body, form)
    assert log == [(what, i) for i in range(3) for what in ("read", "use")]
    assert weight.item() == 1 - 3 * 0.125


@pytest.mark.parametrize("method_name", ["base", "gam"])
def test_where_one_pass_is_all_random_numbers_come_as_in_a_loop_of_ones_own(method_name):
    """Each batch is drawn, and then the masks of its forward."""

    def build():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    def read():
        for _ in range(3):
            yield torch.rand(5, 4)

    ours, plain = build(), build()
    optimizer = plain_or_inactive(method_name, ours.parameters(), lr=0.1)
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        state = torch.get_rng_state()
        for _ in optimizer.passes():
            for x in optimizer.micro_batches(read()):
                ours(x).sum().backward()
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        reference.zero_grad()
        for x in read():
            plain(x).sum().backward()
        reference.step()
        assert torch.equal(after, torch.get_rng_state())
    assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_an_iterator_that_was_read_in_this_pass_says_so_and_a_list_can_be_read_twice():
    weight = nn.Parameter(torch.ones(1))
    optimizer = gam_fast.Base([weight], torch.optim.SGD, lr=0.25)

    def step(batches):
        for _ in optimizer.passes():
            for _ in range(2):
                for x in optimizer.micro_batches(batches):
                    (x * weight).sum().backward()

    step([1.0, 2.0])
    assert weight.item() == 1 - 6 * 0.25
    with pytest.raises(ValueError, match="or is an iterator that was read before"):
        step(iter([1.0, 2.0]))
    assert weight.item() == 1 - 6 * 0.25


def test_micro_batches_of_one_pass_do_not_close_the_generator_they_come_from():
    weight = nn.Parameter(torch.ones(1))
    optimizer = gam_fast.Base([weight], torch.optim.SGD, lr=0.25)
    source = (float(i) for i in range(4))
    for _ in optimizer.passes():
        for x in optimizer.micro_batches(source):
            (x * weight).sum().backward()
            if x == 1.0:
                break
    assert list(source) == [2.0, 3.0]
