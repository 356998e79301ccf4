"""The Triton kernels and their launches, in Triton's interpreter: a process of its own, started by `make interpret`."""

from __future__ import annotations

import pytest
import torch
from cases import BASES, METHODS, VARIANTS, closure_of, in_turn, setting
from primitives import CASES, Formulas, Lists, Place, assert_close
from torch import nn

from gam_fast import backends, ownership
from gam_fast.backends import base, triton
from gam_fast.backends import launches as started

CPU = torch.device("cpu")


@pytest.fixture
def launches(monkeypatch):
    """The names of all kernels that are started."""
    found = []
    start = started.start

    def counted(kernel, programs, *arguments, **constants):
        found.append(kernel.fn.__name__)
        start(kernel, programs, *arguments, **constants)

    monkeypatch.setattr(started, "start", counted)
    return found


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The first move saves the parameters in the same launch."""
    monkeypatch.setattr(triton.TritonBackend, "_saves_apart", staticmethod(lambda device: False))


def lists(count, shapes=((3, 4), (5,))):
    return [[torch.randn(shape) for shape in shapes] for _ in range(count)]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("perturb") and "saved" not in name])
def test_a_launch_that_saves_is_its_formula(name):
    """All others are those of test_backends.py."""
    lists = Lists(torch.float32)
    found = CASES[name](Place(triton.TritonBackend(), takes_tensors=True), lists)
    expected = CASES[name](Place(Formulas()), Lists(torch.float32, stored_as=torch.float64))
    assert lists.are_written_inside_only()
    for copy, value in zip(found.exact, expected.exact, strict=True):
        assert torch.equal(copy.double(), value)
    assert_close(found.rounded, expected.rounded, torch.float32, found.scale)


# Launches


def test_a_thousand_tensors_take_one_launch_a_primitive(launches):
    generator = torch.Generator().manual_seed(3)
    shapes = [(int(n),) for n in torch.randint(0, 12, (1000,), generator=generator)]
    params, grads = lists(2, shapes)
    expected = [p - 0.1 * g for p, g in zip(params, grads, strict=True)]
    leaves = base.Block(params, [i % 2 for i in range(1000)], [p.clone() for p in params], True)
    backend = triton.TritonBackend()
    norm = backend.square_norm(leaves, grads)
    torch.testing.assert_close(norm, torch.cat(grads).double().square().sum(), rtol=1e-6, atol=0.0)
    rows = [(0.1, 0.0, 0.0, 0.0, 0.0, 0.0)] * 2
    d = base.Direction([grads], [[1.0, 1.0]])
    backend.update(leaves, d, "sgd", [[None] * 1000], rows, [(0.0,)], [0] * 1000)
    assert launches == ["sums", "totals", "update"]
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e)


@pytest.mark.usefixtures("_on_each_backend", "as_on_a_gpu")
@pytest.mark.parametrize(("method_name", "build"), in_turn(METHODS, [torch.optim.SGD, torch.optim.AdamW]))
def test_a_step_is_as_many_launches_as_that_of_the_compiled_core(method_name, build, launches):
    method = METHODS[method_name]
    params = [nn.Parameter(torch.randn(shape)) for shape in [(9,), (3, 4)]]
    optimizer = method.optimizer(params, build, lr=0.1, on_nonfinite="ignore", **method.hyper)
    optimizer.step(lambda: sum(p.square().sum() for p in params).backward())
    moves = method.passes - 1
    projects = bool(method.optimizer.recipe.m)
    assert len(launches) == 3 * moves + 2 * projects + 1
    assert launches[-1] == "update"


@pytest.mark.usefixtures("_on_each_backend", "as_on_a_gpu")
@pytest.mark.parametrize(
    ("method_name", "base", "books"),
    in_turn(VARIANTS, ["sgd_nesterov", "rmsprop"], [triton.BOOKKEEPING, triton.BOOKKEEPING, ownership]),
)
def test_a_memory_that_is_written_while_the_weights_are_moved(monkeypatch, method_name, base, books):
    """A direction without a backup of its own does not look for the launch that made the other one."""
    monkeypatch.setattr(triton.TritonBackend, "bookkeeping", books)  # plain lists if there is no compiled core
    model, optimizer, batches = setting(method_name, BASES[base])
    twin, plain, _ = setting(method_name, BASES[base], backend="eager")
    for x, y in batches[:3]:
        optimizer.step(closure_of(model, x, y))
        plain.step(closure_of(twin, x, y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


# Interruptions of the launch that saves and moves


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_around_the_first_move_is_undone(monkeypatch, after):
    params, grads = lists(2)
    before = [p.clone() for p in params]
    backend = triton.TritonBackend()
    leaves = base.Block(params, [0] * len(params), [torch.full_like(p, float("nan")) for p in params])
    start = started.start

    def interrupted(*arguments, **constants):
        if after:
            start(*arguments, **constants)
        raise KeyboardInterrupt

    monkeypatch.setattr(started, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        backend.perturb(leaves, grads, None, [0.1], 1.0, from_start=False)
    assert not leaves.saved
    assert after != all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    backend.restore(leaves)
    assert leaves.saved is after
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_way_back_starts_no_kernel(launches):
    """It must not have to compile one, or to find memory for a table."""
    params, grads = lists(2)
    before = [p.clone() for p in params]
    backend = triton.TritonBackend()
    leaves = base.Block(params, [0] * len(params), backend.allocate(params))
    backend.perturb(leaves, grads, None, [0.1], 1.0, from_start=False)
    launches.clear()
    backend.restore(leaves)
    assert launches == []
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


def test_a_lazy_view_at_a_known_address_is_refused():
    params, grads, backup = lists(3)
    leaves, backend = base.Block(params, [0, 0], backup, True), triton.TritonBackend()
    backend.perturb(leaves, grads, None, [0.1], 1.0, from_start=True)
    with pytest.raises(ValueError, match=r"a\[0\] must be a plain tensor"):
        backend.perturb(leaves, list(map(torch._neg_view, grads)), None, [0.1], 1.0, from_start=True)


# Selection


def test_the_interpreter_takes_cpu_tensors_only_and_only_when_it_is_named():
    assert backends.select("triton", CPU).name == "triton"
    assert backends.select("auto", CPU).name != "triton"
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors only"):
        backends.select("triton", torch.device("cuda"))
    assert "in its interpreter on CPU tensors" in backends.available()["triton"].reason
