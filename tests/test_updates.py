"""The engine's SGD, Adam, AdamW and Lion against those of torch and pytorch-optimizer, fed with the same direction.

What each backend makes of their numbers is proved in test_backends.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from cases import METHODS, closure_of, make, pairwise
from pytorch_optimizer import Lion
from snapshots import assert_close
from torch import nn

import gam_fast
from gam_fast.options import Settings
from gam_fast.parameters import ParameterBlock
from gam_fast.updates import fused, fused_step

SGD_KINDS = [(0.0, 0.0, False), (0.0, 0.3, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)]
SGD_OPTIONS = [
    dict(zip(("momentum", "dampening", "nesterov", "weight_decay", "maximize"), (*kind, *others), strict=True))
    for kind, *others in pairwise(SGD_KINDS, (0.0, 1e-2), (False, True))
]
ADAM_OPTIONS = [
    dict(zip(("amsgrad", "weight_decay", "maximize"), values, strict=True))
    for values in pairwise((False, True), (0.0, 1e-2), (False, True))
]
LION_OPTIONS = [
    dict(zip(("weight_decouple", "fixed_decay", "weight_decay", "maximize"), values, strict=True))
    for values in pairwise((False, True), (False, True), (0.0, 1e-2), (False, True))
]
OPTIMIZERS = [
    *((torch.optim.SGD, {"lr": 0.1, **o}) for o in SGD_OPTIONS),
    *((torch.optim.Adam, {"lr": 1e-2, **o}) for o in ADAM_OPTIONS),
    *((torch.optim.AdamW, {"lr": 1e-2, **o}) for o in ADAM_OPTIONS),
    *((Lion, {"lr": 1e-2, **o}) for o in LION_OPTIONS),
]


class TorchsOwn(torch.optim.SGD):
    """A subclass, whose step the engine must leave to torch."""


def ulps(a, b, floor=2.0**-10):
    """Distance in units in the last place, taken at the larger magnitude of the tensor's entry or ``floor``."""
    eps = torch.finfo(a.dtype).eps
    unit = torch.maximum(a.abs(), b.abs()).clamp_min(floor) * eps
    return float(((a.double() - b.double()).abs() / unit.double()).max()) if a.numel() else 0.0


def parameters(dtype, rounded_to=None):
    generator = torch.Generator().manual_seed(7)
    shapes = [(31, 7), (), (1025,), (0,)]
    values = [torch.randn(shape, generator=generator).to(rounded_to or dtype) for shape in shapes]
    return [nn.Parameter(value.to(dtype)) for value in values]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("base", "options"), OPTIMIZERS, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_equal_to_torch_within_two_ulp(base, options, dtype):
    """One step at a time from the same state, so that an ulp of one step is not amplified by the next.

    A parameter carries the rounding of its step, whose size may exceed its own: torch's square roots are off by an ulp.
    In 16 bits the oracle is torch's step in fp32, of which each stored value is rounded once.
    """
    low = dtype.itemsize == 2
    ours = parameters(dtype)
    theirs = parameters(torch.float32 if low else dtype, dtype)
    optimizer = gam_fast.Base(ours, base, **options)
    assert fused(optimizer.base) is not None
    plain = base(theirs, **options)
    generator = torch.Generator().manual_seed(8)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            q.grad = p.grad.to(q.dtype, copy=True)
        before = [q.detach().clone() for q in theirs]
        optimizer.step()
        plain.step()
        for p, q, start in zip(ours, theirs, before, strict=True):
            step = float((q.detach() - start).abs().max()) if q.numel() else 0.0
            assert ulps(p.detach(), q.detach().to(dtype), floor=max(step, 2.0**-10)) <= 2 - low
            assert optimizer.state[p].keys() == plain.state[q].keys()
            for key, value in plain.state[q].items():
                mine = optimizer.state[p][key]
                assert mine.dtype == (value.dtype if key == "step" else dtype)
                assert ulps(mine, value.to(mine.dtype)) <= 2 - low, key
        with torch.no_grad():
            for p, q in zip(ours, theirs, strict=True):
                p.copy_(q)
                q.copy_(p)
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))  # torch shares the tensors it loads
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_a_gradient_that_comes_late_starts_its_own_state():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    for base, options in (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
        (torch.optim.AdamW, {"lr": 0.1}),
    ):
        ours = [nn.Parameter(p.detach().clone()) for p in (a, b)]
        theirs = [nn.Parameter(p.detach().clone()) for p in (a, b)]
        optimizer, plain = gam_fast.Base(ours, base, **options), base(theirs, **options)
        for step in range(4):
            for params in (ours, theirs):
                for p in params if step >= 2 else params[:1]:
                    p.grad = torch.full_like(p, 0.5 + step)
            optimizer.step()
            plain.step()
        for p, q in zip(ours, theirs, strict=True):
            assert ulps(p.detach(), q.detach()) <= 2
            for key, value in plain.state[q].items():
                assert ulps(optimizer.state[p][key], value) <= 2


def test_adam_groups_may_differ_in_betas_and_amsgrad():
    def build(params):
        return [{"params": params[:1], "betas": (0.8, 0.9)}, {"params": params[1:], "amsgrad": True, "eps": 1e-3}]

    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    optimizer = gam_fast.Base(build(ours), torch.optim.AdamW, lr=1e-2)
    plain = torch.optim.AdamW(build(theirs), lr=1e-2)
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.cos(p.detach() + step)
            q.grad = torch.cos(q.detach() + step)
        optimizer.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_what_torch_must_do_itself():
    weight = [nn.Parameter(torch.ones(2))]
    hooked = torch.optim.SGD(weight, lr=0.1)
    hooked.register_step_pre_hook(lambda *_: None)
    for base in (
        torch.optim.RMSprop(weight),
        TorchsOwn(weight, lr=0.1),
        hooked,
        torch.optim.SGD(weight, lr=torch.tensor(0.1)),
        torch.optim.SGD(weight, lr=0.1, differentiable=True),
        torch.optim.Adam(weight, capturable=True),
        torch.optim.Adam(weight, fused=True),
        torch.optim.AdamW(weight, lr=torch.tensor(0.1)),
        torch.optim.AdamW(weight, lr=0.1, betas=(torch.tensor(0.9), torch.tensor(0.999)), foreach=False),
    ):
        assert fused(base) is None
    assert fused(torch.optim.SGD(weight, lr=0.1, fused=True)).formula == "sgd"
    assert fused(torch.optim.SGD(weight, lr=0.1, foreach=True)).formula == "sgd"


@pytest.mark.parametrize(
    ("method_name", "base", "groups", "limit"),
    pairwise(METHODS, [torch.optim.SGD, TorchsOwn], [1, 2], [1e-3, 0.5, 1e6]),
)
def test_clipping_scales_the_final_direction(method_name, base, groups, limit):
    """torch's clip_grad_norm_ on the direction that the same step without clipping took is the oracle."""
    method = METHODS[method_name]
    model, batches = make("mlp")
    x, y = batches[0]

    def build(net, optimizer_class, **options):
        params = list(net.parameters())
        half = {name: 0.5 * method.hyper[name] for name in method.of_groups}
        given = params if groups == 1 else [{"params": params[:2]}, {"params": params[2:], **half}]
        return method.optimizer(given, optimizer_class, **options, **method.hyper)

    probe = copy.deepcopy(model)
    build(probe, torch.optim.SGD, lr=1.0).step(closure_of(probe, x, y))
    reference = copy.deepcopy(model)
    for p, q, r in zip(model.parameters(), probe.parameters(), reference.parameters(), strict=True):
        r.grad = (p - q).detach()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), limit)
    base(reference.parameters(), lr=0.1).step()
    build(model, base, lr=0.1, clip_grad_norm=limit).step(closure_of(model, x, y))
    assert_close(model, reference, rtol=1e-9, atol=1e-10)


def test_amsgrad_switched_on_in_mid_run_starts_its_maximum():
    model, batches = make("mlp")
    optimizer = gam_fast.SAM(model.parameters(), torch.optim.Adam, lr=1e-2)
    optimizer.step(closure_of(model, *batches[0]))
    optimizer.param_groups[0]["amsgrad"] = True
    optimizer.step(closure_of(model, *batches[1]))
    assert all("max_exp_avg_sq" in state for state in optimizer.state.values())


def test_step_counters_follow_the_default_dtype_as_torchs_do():
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        weight = nn.Parameter(torch.ones(2))
        optimizer = gam_fast.Base([weight], torch.optim.Adam)
        weight.grad = torch.ones(2)
        optimizer.step()
        assert optimizer.state[weight]["step"].dtype == torch.float64
    finally:
        torch.set_default_dtype(previous)


def test_step_counters_stay_on_the_cpu_whatever_the_default_device():
    weight = nn.Parameter(torch.ones(2))
    optimizer = gam_fast.Base([weight], torch.optim.AdamW)
    weight.grad = torch.ones(2)
    with torch.device("meta"):
        optimizer.step()
    assert optimizer.state[weight]["step"].device.type == "cpu"


class OnCuda:
    is_cuda = True


@pytest.mark.parametrize("policy", ["raise", "skip", "ignore"])
def test_a_capture_that_could_not_be_repeated_is_refused_in_words(monkeypatch, policy):
    """What asks for the device is told of one; the rest of a capture needs a GPU (test_gpu.py)."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    weight = nn.Parameter(torch.ones(2))
    optimizer = gam_fast.GAM([weight], torch.optim.AdamW, on_nonfinite=policy)
    block = ParameterBlock([OnCuda()], [0], backend=None)
    with pytest.raises(RuntimeError, match="AdamW counts its steps on the host.*capturable=True"):
        fused_step(optimizer.base, fused(optimizer.base), block, None)
    cuda = [torch.device("cuda")]
    settings = Settings(gam_fast.GAM.recipe, on_nonfinite=policy)
    settings.check_capture([torch.device("cpu")])
    if policy == "ignore":
        settings.check_capture(cuda)
    else:
        with pytest.raises(RuntimeError, match=f"on_nonfinite='{policy}' looks at the norms.*on_nonfinite='ignore'"):
            settings.check_capture(cuda)
    settings.schedule = gam_fast.active.StepSchedule()
    with pytest.raises(RuntimeError, match="a rule such as WhenSteep looks at the norms.*without such rules and radii"):
        settings.check_capture(cuda)
