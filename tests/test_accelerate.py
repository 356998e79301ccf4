"""Accelerate, the real package: the closure form and, unwrapped, the loop form take the steps of a plain loop."""

import copy

import accelerate_closure
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState, PartialState
from frameworks import GAM, by_hand, loader, net, spoil
from pytorch_optimizer import ScheduleFreeSGD
from ranks import same_on_all_ranks
from snapshots import assert_equal
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gam_fast


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


def prepared(accelerator, **options):
    model = net()
    flat = gam_fast.GAM(model.parameters(), torch.optim.SGD, **GAM, **options)
    model, optimizer, batches = accelerator.prepare(model, flat, loader())
    flat.model = model
    torch.manual_seed(9)
    return model, flat, optimizer, batches


@pytest.mark.parametrize("options", [{"clip_grad_norm": 0.5}, {"ascent_share": 0.5, "interval": 2}], ids=str)
def test_the_closure_takes_the_steps_of_the_loop_in_bf16(options):
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model, _, optimizer, batches = prepared(accelerator, **options)
    assert isinstance(optimizer, AcceleratedOptimizer)
    for _ in range(2):
        for batch in batches:

            def closure(turn, batch=batch):
                x, y = turn.rows(*batch)
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)
    assert_equal(accelerator.unwrap_model(model), by_hand(autocast=torch.bfloat16, **options)[0])


@pytest.mark.parametrize("divides", [1, 2], ids=["the loop divides", "Accelerate divides"])
def test_the_loop_form_takes_the_steps_of_the_loop_with_micro_batches(divides):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=divides)
    model, flat, _, batches = prepared(accelerator)
    for _ in range(2):
        epoch = list(batches)
        for pair in (epoch[:2], epoch[2:]):
            for _turn in flat.passes():
                for x, y in flat.micro_batches(pair):
                    accelerator.backward(F.cross_entropy(model(x), y) / (2 / divides))
    assert_equal(accelerator.unwrap_model(model), by_hand(accumulate=2)[0])


def test_it_reaches_the_modes_of_a_schedule_free_base():
    accelerator = Accelerator(cpu=True)
    model = net()
    flat = gam_fast.GAM(model.parameters(), ScheduleFreeSGD, lr=0.1, model=model)
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


def train(accelerator, model, optimizer, batches):
    for x, y in batches:
        optimizer.step(lambda x=x, y=y: accelerator.backward(F.cross_entropy(model(x), y)))


def test_its_state_is_saved_and_loaded(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, _, optimizer, batches = prepared(accelerator)
    train(accelerator, model, optimizer, batches)
    accelerator.save_state(tmp_path)
    train(accelerator, model, optimizer, batches)
    expected = copy.deepcopy(model)
    accelerator.load_state(tmp_path)
    train(accelerator, model, optimizer, batches)
    assert_equal(model, expected)


@pytest.mark.parametrize("backward", [False, True])
def test_accumulation_by_its_own_way_is_warned_of_once(backward):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, _, optimizer, batches = prepared(accelerator)

    def epoch():
        for x, y in batches:
            with accelerator.accumulate(model):
                if backward and not accelerator.sync_gradients:
                    accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step(lambda x=x, y=y: accelerator.backward(F.cross_entropy(model(x), y)))
                optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"micro_batches\(\)") as found:
        epoch()
    said = [str(warning.message) for warning in found]
    of_gradients = [text for text in said if "not used" in text and "accelerator.accumulate" in text]
    of_steps = [text for text in said if "gradient_accumulation_steps=2 of Accelerate" in text]
    assert bool(of_gradients) is backward
    assert len(of_steps) == 1
    assert len(said) == len(of_gradients) + 1


def test_fp16_by_the_loop_form_unscales_and_skips():
    """Its wrapper steps by ``scaler.step(optimizer)``; a CPU stands in for the GPU that it asks for."""

    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    Accelerator(cpu=True)
    ours, theirs = scaler(), scaler()
    model = net()
    flat = gam_fast.GAM(model.parameters(), torch.optim.SGD, model=model, **GAM)
    optimizer = AcceleratedOptimizer(flat, scaler=ours)
    evaluations = 0
    torch.manual_seed(9)
    for _ in range(2):
        for x, y in loader():
            for turn in flat.passes(ours):
                ours.scale(F.cross_entropy(model(x), y) * spoil(evaluations)).backward()
                evaluations += 1
                if turn.last:
                    optimizer.step()
    assert_equal(model, by_hand(scaler=theirs, spoil=spoil)[0])
    assert flat.skipped_steps == 1
    assert ours.state_dict() == theirs.state_dict()


def test_the_example_learns():
    losses = accelerate_closure.main(epochs=2, size=600)
    assert losses[1] < 0.7 * losses[0]


def two_processes(rank, world):
    forget()
    accelerator = Accelerator(cpu=True)
    model, _, optimizer, batches = prepared(accelerator)
    assert isinstance(model, DistributedDataParallel)
    for _ in range(2):
        train(accelerator, model, optimizer, batches)
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
    assert gam_fast.first_pass(accelerator.prepare(torch.optim.SGD(net().parameters(), lr=0.1)))
