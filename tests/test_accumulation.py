"""Micro-batches: the same ones in each pass, adding up to the step of the large batch."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from cases import METHODS, closure_of, loss_of, make
from torch import nn

import gam_fast

pytestmark = pytest.mark.usefixtures("_on_each_backend")


def parts_of(x, y, count=4):
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


@pytest.mark.parametrize("given", ["list", "iterator", "closure", "scaler"])
@pytest.mark.parametrize("method_name", METHODS)
def test_micro_batches_take_the_step_of_the_large_batch(method_name, given):
    method = METHODS[method_name]
    (whole, batches), (model, _) = make("mlp"), make("mlp")
    options = {"lr": 0.1, "momentum": 0.9, **method.hyper}
    large = method.optimizer(whole.parameters(), torch.optim.SGD, **options)
    small = method.optimizer(model.parameters(), torch.optim.SGD, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if given == "scaler" else None
    loader = iter([part for x, y in batches for part in parts_of(x, y)])
    for x, y in batches:
        large.step(closure_of(whole, x, y))
        if given == "closure":
            parts = parts_of(x, y)

            def closure(parts=parts):
                for a, b in small.micro_batches(parts):
                    (loss_of(model, a, b) / len(parts)).backward()

            small.step(closure)
            continue
        for turn in small.passes(scaler=scaler):
            source = parts_of(x, y) if given == "list" else itertools.islice(loader, 4)
            for a, b in small.micro_batches(source):
                turn.backward(loss_of(model, a, b) / 4)
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    if given in ("iterator", "scaler"):
        assert next(loader, None) is None  # each was read once


def test_exact_gam_over_micro_batches():
    (whole, batches), (model, _) = make("mlp"), make("mlp")
    large = gam_fast.ExactGAM(whole.parameters(), torch.optim.SGD, lr=0.1)
    small = gam_fast.ExactGAM(model.parameters(), torch.optim.SGD, lr=0.1)
    for x, y in batches:
        large.step(lambda x=x, y=y: loss_of(whole, x, y))
        for turn in small.passes():
            for a, b in small.micro_batches(parts_of(x, y)):
                turn.backward(loss_of(model, a, b) / 4)
    for p, q in zip(whole.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


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
    (model, batches), (plain, _) = make("batchnorm_cnn"), make("batchnorm_cnn")
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    parts = parts_of(*batches[0], 3)
    for _ in optimizer.passes():
        for x, y in optimizer.micro_batches(parts):
            loss_of(model, x, y).backward()
    for x, _ in parts:
        plain(x)
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_empty_accumulation_is_an_error_and_undoes_the_step():
    model, _ = make("mlp")
    before = [p.clone() for p in model.parameters()]
    optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1)

    def step():
        for _ in optimizer.passes():
            for x in optimizer.micro_batches(iter(())):
                model(x).sum().backward()

    with pytest.raises(ValueError, match="micro_batches.. got none: the loader is at its end"):
        step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    assert optimizer.turn is None


def test_micro_batches_are_not_held_after_the_step():
    model, batches = make("mlp")
    optimizer = METHODS["gam"].optimizer(model.parameters(), torch.optim.SGD, lr=0.1)
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


def test_the_turn_is_known_to_a_closure():
    weight = nn.Parameter(torch.ones(2))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)
    seen = []

    def closure():
        seen.append((optimizer.turn.index, optimizer.turn.last))
        (weight**2).sum().backward()

    assert optimizer.turn is None
    optimizer.step(closure)
    assert seen == [(0, False), (1, False), (2, False), (3, True)]
    assert optimizer.turn is None


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
@pytest.mark.parametrize("method_name", METHODS)
def test_step_in_the_last_pass_takes_the_step_at_once(method_name, base):
    """What a framework does that calls step() itself."""
    method = METHODS[method_name]
    (one, batches), (two, _) = make("mlp"), make("mlp")
    first = method.optimizer(one.parameters(), base, lr=0.01, **method.hyper)
    second = method.optimizer(two.parameters(), base, lr=0.01, **method.hyper)
    hooks = []
    first.register_step_post_hook(lambda *_: hooks.append(None))
    for x, y in batches:
        first.step(closure_of(one, x, y))
        for turn in second.passes():
            loss_of(two, x, y).backward()
            if turn.last:
                second.step()
                assert second.turn is None
                stepped = [p.detach().clone() for p in two.parameters()]
        for p, q, r in zip(one.parameters(), two.parameters(), stepped, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(q, r)
    assert len(hooks) == len(batches)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_nan_found_by_step_in_the_last_pass_undoes_the_step(policy):
    model, batches = make("mlp")
    optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1, on_nonfinite=policy)
    before = [p.detach().clone() for p in model.parameters()]

    def step():
        for turn in optimizer.passes():
            (loss_of(model, *batches[0]) * (float("nan") if turn.last else 1.0)).backward()
            if turn.last:
                optimizer.step()

    if policy == "raise":
        with pytest.raises(gam_fast.NonFiniteGradientError):
            step()
    else:
        step()
        assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    optimizer.step(closure_of(model, *batches[0]))


def test_step_before_the_last_pass_is_refused():
    model, batches = make("mlp")
    optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]

    def step():
        for _ in optimizer.passes():
            loss_of(model, *batches[0]).backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match=r"step\(\) while a step of this SAM is under way"):
        step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
