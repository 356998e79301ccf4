"""Accelerate, the real package: the closure form and, unwrapped, the loop form take the steps of a plain loop."""

from __future__ import annotations

import accelerate_closure
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from ranks import same_on_all_ranks
from schedule_free import ScheduleFree
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import gam_fast

GAM = {"lr": 0.05, "momentum": 0.9, "rho": 0.1, "rho_prime": 0.05}


@pytest.fixture(autouse=True)
def _fresh_state():
    forget()  # what tests of other files have left behind
    yield
    forget()


def forget():
    """Accelerate keeps its settings for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def loader(rows=48, batch=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(3, (rows,), generator=generator)), batch)


def net(dropout=0.2):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Tanh(), nn.Linear(16, 3))


def prepared(accelerator, **options):
    model = net()
    flat = gam_fast.GAM(model.parameters(), torch.optim.SGD, **GAM, **options)
    model, optimizer, batches = accelerator.prepare(model, flat, loader())
    flat.model = model
    return model, flat, optimizer, batches


def by_hand(epochs=2, autocast=False, **options):
    model = net()
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, **GAM, model=model, **options)
    torch.manual_seed(9)
    for _ in range(epochs):
        for x, y in loader():
            for turn in optimizer.passes():
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    out = model(x)
                turn.backward(F.cross_entropy(out.float(), y))
    return model


def assert_same_model(ours, theirs):
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("form", ["closure", "loop"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_takes_the_steps_of_the_loop(form, precision):
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    model, flat, optimizer, batches = prepared(accelerator, clip_grad_norm=0.5)
    assert isinstance(optimizer, AcceleratedOptimizer)
    torch.manual_seed(9)
    for _ in range(2):
        for x, y in batches:

            def closure(x=x, y=y):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss

            if form == "closure":
                optimizer.step(closure)
            else:
                for _turn in flat.passes():
                    closure()
    assert_same_model(accelerator.unwrap_model(model), by_hand(autocast=precision == "bf16", clip_grad_norm=0.5))


def test_a_closure_with_an_argument_gets_the_turn():
    accelerator = Accelerator(cpu=True)
    options = {"ascent_share": 0.5, "interval": 2}
    model, _, optimizer, batches = prepared(accelerator, **options)
    torch.manual_seed(9)
    for x, y in batches:

        def closure(turn, x=x, y=y):
            own_x, own_y = turn.rows(x, y)
            accelerator.backward(F.cross_entropy(model(own_x), own_y))

        optimizer.step(closure)
    plain = net()
    flat = gam_fast.GAM(plain.parameters(), torch.optim.SGD, **GAM, model=plain, **options)
    torch.manual_seed(9)
    for batch in loader():
        for turn in flat.passes():
            x, y = turn.rows(batch)
            F.cross_entropy(plain(x), y).backward()
    assert_same_model(accelerator.unwrap_model(model), plain)


@pytest.mark.parametrize("method", [gam_fast.Base, gam_fast.SAM, gam_fast.GAM])
def test_it_reaches_the_modes_of_a_schedule_free_base(method):
    accelerator = Accelerator(cpu=True)
    model = net()
    flat = method(model.parameters(), ScheduleFree, lr=0.1, model=model)
    optimizer = accelerator.prepare_optimizer(flat)
    for x, y in loader():
        flat.step(lambda x=x, y=y: F.cross_entropy(model(x), y).backward())
    optimizer.eval()
    averaged = [p.detach().clone() for p in model.parameters()]
    flat.train()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), averaged, strict=True))
    flat.base.eval()
    for p, q in zip(model.parameters(), averaged, strict=True):
        torch.testing.assert_close(p.detach(), q)
    optimizer.train()


def test_its_state_is_saved_and_loaded(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, _, optimizer, batches = prepared(accelerator)

    def epoch():
        for x, y in batches:
            optimizer.step(lambda x=x, y=y: accelerator.backward(F.cross_entropy(model(x), y)))

    epoch()
    accelerator.save_state(tmp_path)
    epoch()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    accelerator.load_state(tmp_path)
    epoch()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_accumulation_by_its_own_way_is_warned_of():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, _, optimizer, batches = prepared(accelerator)

    def epoch():
        for x, y in batches:
            with accelerator.accumulate(model):
                if not accelerator.sync_gradients:
                    accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step(lambda x=x, y=y: accelerator.backward(F.cross_entropy(model(x), y)))
                optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"not used.*micro_batches\(\).*accelerator.accumulate"):
        epoch()


def test_accumulation_by_micro_batches_takes_the_steps_of_the_large_batch():
    accelerator = Accelerator(cpu=True)
    models = []
    for accumulate in (1, 2):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        flat = gam_fast.GAM(model.parameters(), torch.optim.SGD, **GAM)
        model, _, batches = accelerator.prepare(model, flat, loader(batch=24 // accumulate))
        batches = list(batches)
        for first in range(0, len(batches), accumulate):
            for _ in flat.passes():
                for x, y in flat.micro_batches(batches[first : first + accumulate]):
                    accelerator.backward(F.cross_entropy(model(x.double()), y) / accumulate)
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_fp16_by_the_loop_form_unscales_and_skips():
    """Its wrapper steps by ``scaler.step(optimizer)``; a CPU stands in for the GPU that it asks for."""
    Accelerator(cpu=True)
    (model, flat), (twin, other) = (
        (m := net(), gam_fast.GAM(m.parameters(), torch.optim.SGD, model=m, **GAM)) for _ in "ab"
    )
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3) for _ in "ab"]
    optimizer = AcceleratedOptimizer(flat, scaler=scalers[0])
    for k, (x, y) in enumerate(loader()):
        bad = float("inf") if k == 2 else 1.0
        torch.manual_seed(k)
        for turn in flat.passes(scalers[0]):
            scalers[0].scale(F.cross_entropy(model(x), y) * (bad if turn.last else 1.0)).backward()
            if turn.last:
                optimizer.step()
        torch.manual_seed(k)
        for turn in other.passes(scaler=scalers[1]):
            turn.backward(F.cross_entropy(twin(x), y) * (bad if turn.last else 1.0))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert flat.skipped_steps == 1
    assert scalers[0].state_dict() == scalers[1].state_dict()


def test_a_closure_under_a_scaler_is_an_error():
    Accelerator(cpu=True)
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(gam_fast.GAM(model.parameters(), torch.optim.SGD, **GAM), scaler=scaler)
    x, y = next(iter(loader()))

    def closure():
        scaler.scale(F.cross_entropy(model(x), y)).backward()

    closure()
    with pytest.raises(RuntimeError, match=r"takes no closure.*passes\(scaler=scaler\)"):
        optimizer.step(closure)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


def test_the_example_learns():
    losses = accelerate_closure.main(epochs=2, size=600)
    assert losses[1] < 0.7 * losses[0]


def two_processes(rank, world):
    forget()
    accelerator = Accelerator(cpu=True)
    model, _, optimizer, batches = prepared(accelerator)
    assert isinstance(model, DistributedDataParallel)
    for _ in range(2):
        for x, y in batches:
            optimizer.step(lambda x=x, y=y: accelerator.backward(F.cross_entropy(model(x), y)))
    same = same_on_all_ranks(list(model.parameters()))
    forget()
    return same, len(batches)


def test_two_processes_stay_equal(two):
    assert two.run(two_processes) == [(True, 2), (True, 2)]


def test_the_first_pass_is_known_through_the_wrapper():
    accelerator = Accelerator(cpu=True)
    model, _, optimizer, batches = prepared(accelerator)
    said = [gam_fast.first_pass(optimizer)]
    x, y = next(iter(batches))

    def closure():
        said.append(gam_fast.first_pass(optimizer))
        accelerator.backward(F.cross_entropy(model(x), y))

    optimizer.step(closure)
    assert said == [True, True, False, False, False]
    plain = accelerator.prepare(torch.optim.SGD(net().parameters(), lr=0.1))
    assert gam_fast.first_pass(plain)
