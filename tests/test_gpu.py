"""What only a real GPU can show: the same trajectories as on the CPU, no wait for the device, and graph capture."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import METHODS, MODELS, closure_of, make
from torch import nn

import gam_fast

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a real GPU")]


def _device_types():
    try:
        from gam_fast import _C
    except ImportError:
        return []
    return _C.device_types()


UNCHECKED = {"on_nonfinite": "ignore"}


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("method_name", METHODS)
def test_trajectories_are_those_of_the_cpu(method_name, base, model_name):
    method = METHODS[method_name]
    model, batches = make(model_name)
    twin = copy.deepcopy(model).cuda()
    optimizers = [
        method.optimizer(m.parameters(), base, lr=1e-3, model=m, clip_grad_norm=5.0, **method.hyper)
        for m in (model, twin)
    ]
    for k in range(8):
        x, y = batches[k % len(batches)]
        optimizers[0].step(closure_of(model, x, y))
        with torch.device("cuda"):  # where the transformer makes its mask
            optimizers[1].step(closure_of(twin, x.cuda(), y.cuda()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-8, atol=1e-9)


def parabola():
    weight = nn.Parameter(torch.randn(64, 64, device="cuda"))

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    return weight, closure


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("method_name", METHODS)
def test_nothing_waits_for_the_device(method_name, base):
    method = METHODS[method_name]
    weight, closure = parabola()
    optimizer = method.optimizer([weight], base, lr=1e-2, **method.hyper, **UNCHECKED)
    optimizer.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif("cuda" not in _device_types(), reason="needs a real GPU, and a core built for CUDA")
def test_a_step_of_gam_is_twelve_launches():
    from gam_fast import _C

    weight, closure = parabola()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=1e-2, momentum=0.9)
    for _ in range(3):
        before = _C.launches()
        optimizer.step(closure)
        assert _C.launches() - before == 12


@pytest.mark.parametrize("method_name", METHODS)
def test_a_step_can_be_captured_in_a_graph(method_name):
    method = METHODS[method_name]
    weight, closure = parabola()
    twin = nn.Parameter(weight.detach().clone())
    options = {"lr": 1e-2, "momentum": 0.9, "replay_rng": False, **UNCHECKED, **method.hyper}
    optimizer = method.optimizer([weight], torch.optim.SGD, **options)
    plain = method.optimizer([twin], torch.optim.SGD, **options)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step(closure)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step(closure)
    for _ in range(3):
        graph.replay()
    for _ in range(6):
        plain.step(lambda: twin.square().sum().backward())
    torch.testing.assert_close(weight, twin, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_undoes_the_step():
    weight, closure = parabola()
    before = weight.detach().clone()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)

    def spoiled():
        for turn in optimizer.passes():
            closure()
            if turn.index == 1:
                weight.grad[3, 3] = float("nan")

    with pytest.raises(gam_fast.NonFiniteGradientError, match="a pass of GAM"):
        spoiled()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_two_hundred_steps_with_lr_zero_change_no_bit(dtype):
    weight = nn.Parameter(torch.randn(1000, device="cuda").to(dtype))
    before = weight.detach().clone()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.0, momentum=0.9)
    for _ in range(200):
        optimizer.step(lambda: weight.square().sum().backward())
    assert torch.equal(weight, before)
