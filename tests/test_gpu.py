"""What only a real GPU can show: the same trajectories as on the CPU, no wait for the device, and graph capture."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from cases import ALL, METHODS, MODELS, closure_of, loss_of, make, pairwise
from torch import nn

import gam_fast
from gam_fast import backends, flatness
from gam_fast.backends import launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a real GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # torch's compiler, of any fp32 product
    # torch says so once a process, having switched the mode already: as an error it would leave it switched
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]


UNCHECKED = {"on_nonfinite": "ignore"}


@pytest.fixture(autouse=True, params=["native", "triton"])
def backend_name(_same_start, request, monkeypatch):
    found = backends._classes()[request.param]
    reason = found if isinstance(found, str) else found.refusal(torch.device("cuda", torch.cuda.current_device()))
    if reason is not None:
        pytest.skip(f"this GPU cannot have it: {reason}")
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, request.param)
    return request.param


def on_the_cpu(monkeypatch, make_optimizer, model):
    """An optimizer on the CPU, which cannot have each backend that a GPU can."""
    with monkeypatch.context() as patch:
        patch.delenv(backends.ENVIRONMENT_VARIABLE)
        return make_optimizer(model)


@pytest.mark.parametrize("method_name", ["sam", "gam"])
def test_compiled_with_cuda_graphs(method_name):
    """``mode="reduce-overhead"``: the graphs write their gradients to the same memory in every pass."""
    method = METHODS[method_name]
    model, batches = make("batchnorm_cnn", torch.float32)
    twins = [model.cuda(), copy.deepcopy(model).cuda()]
    compiled = torch.compile(twins[0], mode="reduce-overhead")
    optimizers = [
        method.optimizer(m.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, model=m, **method.hyper) for m in twins
    ]
    for k in range(8):
        x, y = (t.cuda() for t in batches[k % len(batches)])
        for module, optimizer in zip((compiled, twins[1]), optimizers, strict=True):
            optimizer.step(closure_of(module, x, y))
    for p, q in zip(*(twin.state_dict().values() for twin in twins), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("by_scaler", [False, True])
@pytest.mark.parametrize("method_name", ["base", "sam", "gam"])
def test_fp16_with_a_scaler(method_name, by_scaler):
    """A scale that is too large in every pass finds its way down, and no skipped step moves a weight."""
    method = METHODS[method_name]
    model, batches = make("mlp", torch.float32)
    model.cuda()
    optimizer = method.optimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, model=model, **method.hyper)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, growth_interval=1000)
    x, y = (t.cuda() for t in batches[0])
    losses = []
    for _ in range(40):
        before = [p.detach().clone() for p in model.parameters()]
        skipped = optimizer.skipped_steps
        for turn in optimizer.passes(scaler=None if by_scaler else scaler):
            with torch.autocast("cuda", torch.float16):
                loss = loss_of(model, x, y)
            scaler.scale(loss).backward()
            if turn.index == 0:
                losses.append(float(loss.detach()))
            if by_scaler and turn.last:
                scaler.step(optimizer)
                scaler.update()
        stayed = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert all(stayed) if optimizer.skipped_steps > skipped else not any(stayed)
    assert scaler.get_scale() == 2.0 ** (24 - optimizer.skipped_steps)
    assert losses[-1] < 0.9 * losses[0]


def momentum_of(base):
    return {} if base is torch.optim.AdamW else {"momentum": 0.5}


@pytest.mark.parametrize(
    ("method_name", "base", "model_name", "norm"),
    pairwise(ALL, [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop], MODELS, ["global", "group"]),
)
def test_trajectories_are_those_of_the_cpu(method_name, base, model_name, norm, monkeypatch):
    method, more = ALL[method_name], momentum_of(base)
    if method_name != "asam":
        more["norm"] = norm
    model, batches = make(model_name)
    twin = copy.deepcopy(model).cuda()

    def optimizer_of(m):
        groups = gam_fast.subsets.layers(m)
        return method.optimizer(groups, base, lr=1e-3, model=m, clip_grad_norm=5.0, **more, **method.hyper)

    optimizers = [on_the_cpu(monkeypatch, optimizer_of, model), optimizer_of(twin)]
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


@pytest.mark.parametrize(
    ("method_name", "base", "norm"),
    [*product(ALL, [torch.optim.SGD, torch.optim.AdamW], ["global"]), ("gam", torch.optim.SGD, "group")],
)
def test_nothing_waits_for_the_device(method_name, base, norm):
    method = ALL[method_name]
    weight, closure = parabola()
    more = {**momentum_of(base), **method.hyper, **UNCHECKED}
    optimizer = method.optimizer([weight], base, lr=1e-2, norm=norm, **more)
    optimizer.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("hyper", [{}, {"sam_rho": 0.05}])
def test_exact_gam_is_that_of_the_cpu_and_waits_for_nothing(hyper, monkeypatch):
    model, batches = make("batchnorm_cnn")
    twin = copy.deepcopy(model).cuda()

    def optimizer_of(m):
        options = {"lr": 1e-2, "momentum": 0.9, "model": m, **hyper, **UNCHECKED}
        return gam_fast.ExactGAM(m.parameters(), torch.optim.SGD, **options)

    optimizers = [on_the_cpu(monkeypatch, optimizer_of, model), optimizer_of(twin)]
    for k, (x, y) in enumerate(batches):
        on_device = x.cuda(), y.cuda()
        optimizers[0].step(lambda x=x, y=y: loss_of(model, x, y))
        if k == 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizers[1].step(lambda batch=on_device: loss_of(twin, *batch))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-8, atol=1e-9)


def test_flatness_is_that_of_the_cpu(backend_name):
    if backend_name != "native":
        pytest.skip("it has no part in flatness")
    pytest.importorskip("curvlinops")
    model, batches = make("batchnorm_cnn")
    state = torch.cuda.get_rng_state()
    found = []
    for device in ("cpu", "cuda"):
        loss = flatness.Loss(copy.deepcopy(model).to(device), nn.CrossEntropyLoss(), batches)
        options = {"eigenvalues": 2, "trace_samples": loss.size, "density_steps": 40, "tolerance": 1e-4}
        found.append(flatness.measure(loss, 0.1, **options))
    one, other = found
    assert other.loss == pytest.approx(one.loss, rel=1e-9)
    assert other.zeroth_order[0].value == pytest.approx(one.zeroth_order[0].value, rel=1e-5)
    assert other.first_order[0].value == pytest.approx(one.first_order[0].value, rel=1e-5)
    assert other.eigenvalues.values == pytest.approx(one.eigenvalues.values, rel=1e-5)
    assert other.trace.value == pytest.approx(one.trace.value, rel=1e-7)
    assert other.density.extremes == pytest.approx(one.density.extremes, rel=1e-3)
    assert torch.equal(torch.cuda.get_rng_state(), state)


def test_a_step_of_gam_is_twelve_launches(backend_name, monkeypatch):
    started = []
    if backend_name == "native":
        from gam_fast import _C

        count = _C.launches
    else:
        start = launches.start
        monkeypatch.setattr(launches, "start", lambda *a, **k: (started.append(a[0]), start(*a, **k)))
        count = lambda: len(started)  # noqa: E731
    weight, closure = parabola()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=1e-2, momentum=0.9)
    for _ in range(3):
        before = count()
        optimizer.step(closure)
        assert count() - before == 12


def test_a_step_copies_no_table_while_addresses_stay():
    torch.cuda.empty_cache()  # blocks that other tests have left behind would be handed out in turns
    weight, evaluate = parabola()
    addresses = []

    def closure():
        loss = evaluate()
        addresses.append(weight.grad.data_ptr())
        return loss

    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=1e-2, momentum=0.9, **UNCHECKED)
    for _ in range(6):
        optimizer.step(closure)
    assert addresses[-4:] == addresses[-8:-4]
    # without acc_events torch warns, once a process, that it forgets the events of other cycles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        optimizer.step(closure)
    copied = [event for event in profile.events() if "memcpy htod" in event.name.lower()]
    assert copied == []


@pytest.mark.parametrize("method_name", [name for name in ALL if name != "look"])  # whose steps are of two kinds
def test_a_step_can_be_captured_in_a_graph(method_name):
    method = ALL[method_name]
    weight, closure = parabola()
    twin = nn.Parameter(weight.detach().clone())
    options = {"lr": 1e-2, "momentum": 0.9, "replay_rng": False, **UNCHECKED, **method.hyper}
    optimizer = method.optimizer([weight], torch.optim.SGD, **options)
    plain = method.optimizer([twin], torch.optim.SGD, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
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


def test_steps_on_two_streams_by_turns():
    weight, closure = parabola()
    twin = nn.Parameter(weight.detach().clone())
    options = {"lr": 1e-2, "momentum": 0.9, **UNCHECKED}
    optimizer, plain = (gam_fast.GAM([w], torch.optim.SGD, **options) for w in (weight, twin))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for k in range(8):
        stream = streams[k % 2]
        stream.wait_stream(streams[1 - k % 2] if k else torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step(closure)
            torch.empty(1 << 20, device="cuda").fill_(float("nan"))  # where memory that was freed too early would lie
    torch.cuda.synchronize()
    for _ in range(8):
        plain.step(lambda: twin.square().sum().backward())
    torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_nan_comes_back_as_it_was(dtype):
    bits = torch.arange(-(1 << 15), 1 << 15, device="cuda").to(torch.int16)
    weight = nn.Parameter(bits.view(dtype).clone())
    optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, **UNCHECKED)
    for turn in optimizer.passes():
        if turn.index == 1:
            break
        weight.grad = torch.ones_like(weight)
    assert torch.equal(weight.detach().view(torch.int16), bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_two_hundred_steps_with_lr_zero_change_no_bit(dtype):
    weight = nn.Parameter(torch.randn(1000, device="cuda").to(dtype))
    before = weight.detach().clone()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.0, momentum=0.9)
    for _ in range(200):
        optimizer.step(lambda: weight.square().sum().backward())
    assert torch.equal(weight, before)
