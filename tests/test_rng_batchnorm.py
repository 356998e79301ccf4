"""Rule 2: the same function in all passes; running statistics and random state as if the first were the only one."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from cases import EXACT, METHODS
from torch import nn

import gam_fast
from gam_fast import rng
from gam_fast.buffers import ForwardState
from gam_fast.rng import ReplayRNG


@pytest.mark.parametrize("is_given", [False, True])
def test_statistics_move_in_every_pass_without_model_or_when_switched_off(is_given):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    options = {"model": model, "freeze_running_statistics": False} if is_given else {}
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.01, **options)
    warning = pytest.warns(UserWarning, match="1.running_mean.*model=")
    with contextlib.nullcontext() if is_given else warning:
        optimizer.step(lambda: model(torch.randn(6, 5)).square().sum().backward())
    assert int(model[1].num_batches_tracked) == 4


def test_a_nan_in_a_later_pass_does_not_reach_the_statistics():
    norm = nn.BatchNorm1d(4)
    state = ForwardState()
    state.enter(norm)
    state.begin()
    norm(torch.ones(6, 4))
    kept = norm.running_mean.clone()
    state.begin()
    norm(torch.full((6, 4), float("nan")))
    assert norm.running_mean.isnan().all()
    state.exit(undo=False)
    assert torch.equal(norm.running_mean, kept)


class StochasticDepth(nn.Module):
    """Drops its branch with probability ½ a sample, and a unit with probability ½."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.seen = []

    def forward(self, x):
        keep = torch.bernoulli(torch.full((x.shape[0], 1), 0.5))
        units = nn.functional.dropout(torch.ones_like(x), 0.5, self.training)
        self.seen.append((keep, units.clone()))
        return (x + keep * units * self.linear(x)).square().sum()


@pytest.mark.parametrize("method_name", ["sam", "gam", "exact_sam"])
@pytest.mark.parametrize("replay", [True, False])
def test_dropout_and_stochastic_depth_draw_the_same_in_every_pass(method_name, replay):
    method = (METHODS | EXACT)[method_name]
    model = StochasticDepth()
    optimizer = method.optimizer(model.parameters(), torch.optim.SGD, lr=0.1, replay_rng=replay, **method.hyper)
    for _ in range(2):
        model.seen.clear()
        x = torch.randn(32, 5)
        for turn in optimizer.passes():
            turn.backward(model(x))
        same = [torch.equal(a, b) for draw in model.seen[1:] for a, b in zip(draw, model.seen[0], strict=True)]
        assert all(same) if replay else not any(same)


class FakeAccelerator(types.SimpleNamespace):
    """A device module with a generator a device, whose state is a tensor of one number."""

    def get_rng_state(self, device):
        return self.states[device.index].clone()

    def set_rng_state(self, state, device):
        self.states[device.index] = state.clone()


@pytest.mark.parametrize("fail", [False, True])
def test_generators_of_accelerators_are_replayed(monkeypatch, fail):
    fake = FakeAccelerator(states=[torch.tensor([5]), torch.tensor([7])])
    monkeypatch.setattr(rng, "_device_module", lambda device: fake)
    devices = [torch.device("xpu", 0), torch.device("xpu", 1), torch.device("xpu", 1), torch.device("cpu")]
    seen = []

    def walk():
        with ReplayRNG(devices) as replay:
            assert replay.devices == [torch.device("cpu"), torch.device("xpu", 0), torch.device("xpu", 1)]
            for _ in range(3):
                replay.begin()
                seen.append((int(fake.states[0]), int(fake.states[1])))
                fake.states[0] += 1
                fake.states[1] += 10
                if fail and len(seen) == 2:
                    raise ValueError

    if fail:
        with pytest.raises(ValueError, match="^$"):
            walk()
    else:
        walk()
    assert set(seen) == {(5, 7)}
    assert [int(s) for s in fake.states] == ([5, 7] if fail else [6, 17])


def test_the_mps_generator_takes_no_device(monkeypatch):
    state = torch.tensor([3])
    monkeypatch.setattr(
        rng,
        "_device_module",
        lambda device: types.SimpleNamespace(get_rng_state=state.clone, set_rng_state=state.copy_),
    )
    with ReplayRNG([torch.device("mps")]) as replay:
        for _ in range(2):
            replay.begin()
            state += 1
    assert int(state) == 4


def test_statistics_of_a_script_module_are_found():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    script = torch.jit.script(model)
    optimizer = gam_fast.SAM(script.parameters(), torch.optim.SGD, lr=0.1, model=script)
    optimizer.step(lambda: script(torch.randn(4, 2)).square().sum().backward())
    assert int(model[1].num_batches_tracked) == 1


def test_a_cuda_graph_capture_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="replay_rng=False"), ReplayRNG([torch.device("cuda", 0)]):
        pass
    with ReplayRNG() as replay:  # a CPU model is not concerned
        replay.begin()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a real GPU")
def test_the_cuda_generator_is_replayed():
    device = torch.device("cuda", 0)
    with ReplayRNG([device]) as replay:
        draws = []
        for _ in range(3):
            replay.begin()
            draws.append(torch.rand(4, device=device))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
