"""Micro-batches: the same ones in each pass, adding up to the step of the large batch."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from cases import METHODS, closure_of, loss_of, make
from torch import nn

import gam_fast


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


def plain_or_inactive(method_name, params, **options):
    """A step of one pass: the base optimizer alone, as a method and as an inactive step of another."""
    method = METHODS[method_name]
    interval = 1 if method.passes == 1 else float("inf")
    return method.optimizer(params, torch.optim.SGD, interval=interval, **options, **method.hyper)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("form", ["passes", "closure"])
@pytest.mark.parametrize("method_name", METHODS)
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

    if form == "closure":
        optimizer.step(body)
    else:
        for _ in optimizer.passes():
            body()
    assert log == [(what, i) for i in range(3) for what in ("read", "use")]
    assert weight.item() == 1 - 3 * 0.125


@pytest.mark.parametrize("method_name", METHODS)
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
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_decision_after_the_first_pass_has_all_of_them_read():
    weight = nn.Parameter(torch.ones(1))
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.125, active=gam_fast.active.WhenSteep(), rho=0.0)
    for _ in range(6):
        source = iter([1.0, 2.0])
        for _ in optimizer.passes():
            for x in optimizer.micro_batches(source):
                (x * weight).sum().backward()
    assert weight.item() == 1 - 6 * 3 * 0.125


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
