"""The CUDA core under the emulator: orders of threads, launches, tables, streams, graphs, planted bugs."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import emulated
import pytest
import torch
from cases import CAN_EMULATE, DTYPES, METHODS, VARIANTS, pairwise
from primitives import run_all, same_bits
from snapshots import Dispatched
from torch.utils import cpp_extension

import gam_fast
from gam_fast import sums
from gam_fast.backends import base

if not CAN_EMULATE:
    pytest.skip("the emulator needs a compiler, and x86-64 Linux", allow_module_level=True)

SGD_ROW = (0.1, 0.9, 0.0, 0.0, 0.0, 0.0)


@pytest.fixture
def core():
    yield emulated.core()
    emulated.core().set_order("fwd")
    emulated.core().use_stream(0)
    emulated.core().capture(0)


def lists(count, shapes):
    return [[torch.randn(shape) for shape in shapes] for _ in range(count)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_order_of_threads_and_blocks_changes_a_bit(core, dtype):
    shapes = [(8193,), (33,), (), (0,), (5, 7)]
    forwards = run_all(emulated.backend(), dtype, shapes)
    for order in ("rev", "rand:1"):
        core.set_order(order)
        for name, values in run_all(emulated.backend(), dtype, shapes).items():
            assert same_bits(values, forwards[name]), f"{order}: {name}"


# Launches and tables


def counts_of_the_last(core, optimizer, params, steps):
    """Launches, uploads, and the operations of torch that would be kernels on a GPU."""
    for _ in range(steps):
        gradients = [torch.randn(7) for _ in range(4 * len(params))]  # the optimizer may take their memory
        launches, uploads = core.launches(), core.uploads()
        with Dispatched(but=r"(aten\.(empty|view|detach|alias)|profiler)") as dispatched:
            for _ in optimizer.passes():
                for param in params:
                    param.grad = gradients.pop()
    return core.launches() - launches, core.uploads() - uploads, set(dispatched.names)


@pytest.mark.parametrize(
    ("method_name", "base_name", "policy", "clip"),
    pairwise(METHODS, ["SGD", "AdamW"], ["raise", "ignore"], [None, 1.0]),
)
def test_a_step_is_as_many_launches_as_its_table_says(core, monkeypatch, method_name, base_name, policy, clip):
    """A norm is 2 launches, a move 1, the products 2, the update 1; GAM makes 12. And no kernel of torch's."""
    emulated.use(monkeypatch)
    method = METHODS[method_name]
    params = [torch.nn.Parameter(torch.randn(7)) for _ in range(5)]
    build = partial(getattr(torch.optim, base_name), lr=0.1, **({"momentum": 0.9} if base_name == "SGD" else {}))
    optimizer = method.optimizer(params, build, on_nonfinite=policy, clip_grad_norm=clip, **method.hyper)
    launches, uploads, dispatched = counts_of_the_last(core, optimizer, params, steps=3)
    moves = method.passes - 1
    products = bool(optimizer.recipe.m) or policy == "raise" or clip is not None
    assert launches == 3 * moves + 2 * products + 1
    on_host = {"aten.stack.default", "aten.add.Tensor", "aten._foreach_add_.Scalar"}  # Adam's counters of steps
    assert dispatched <= (on_host if base_name == "AdamW" else set())
    assert uploads <= 4 * method.passes


LAUNCHES = {
    "friendly": 6,  # the mixture; a norm, a move; the update; the memory
    "vasso": 6,
    "momentum_sam": 4,
    "previous_gradient": 6,  # the gradient is copied, and copied into the memory
    "look": 10,  # of a step of SAM: the products, the memory, its norm and its copy
    "wsam": 5,  # a move after the update
    "wsam_coupled": 4,
    "cr": 5,  # one norm for two moves
    "sagm": 4,
    "usam": 4,
    "stable": 6,  # the products
}


@pytest.mark.parametrize("method_name", VARIANTS)
def test_a_step_of_a_relative_of_sam_is_few_launches(core, monkeypatch, method_name):
    """Without looking for NaN. Only a method that needs the ratio of two lengths has kernels of torch's, of numbers.

    None copies or makes a tensor of a number, for which a GPU would wait.
    """
    emulated.use(monkeypatch)
    method = VARIANTS[method_name]
    params = [torch.nn.Parameter(torch.randn(7)) for _ in range(5)]
    optimizer = method.optimizer(params, torch.optim.SGD, lr=0.1, momentum=0.9, on_nonfinite="ignore", **method.hyper)
    # the fourth is a step of SAM in LookSAM too
    launches, _, dispatched = counts_of_the_last(core, optimizer, params, steps=4)
    assert launches == LAUNCHES[method_name]
    assert method_name in ("stable", "look") or not dispatched
    assert not {name for name in dispatched if re.search(r"copy|scalar_tensor|full\.default", name)}


def test_a_thousand_tensors_are_one_launch_and_one_upload(core):
    backend = emulated.backend()
    params, backup, a, b, buffers = lists(5, [(64,)] * 1000)
    leaves = base.Block(params, [0] * 1000, backup, False)
    d = base.Direction([a, b], [[0.5], [0.5]])

    def step():
        before = core.launches(), core.uploads()
        backend.perturb(leaves, a, None, [0.1], 4.0, from_start=False)
        backend.update(leaves, d, "sgd", [buffers], [SGD_ROW], [(0.0,)], [0] * 1000)
        backend.restore(leaves)
        leaves.saved = False
        return core.launches() - before[0], core.uploads() - before[1]

    # the plan's own table the first time, and one for each call
    assert [step(), step(), step()] == [(3, 4), (3, 0), (3, 0)]


def test_tables_follow_addresses_numbers_streams_and_captures(core):
    backend = emulated.backend()
    (params, backup, a, b), others = lists(4, [(100,), (5, 7)]), lists(40, [(100,), (5, 7)])
    leaves = base.Block(params, [0, 0], backup)

    def uploads(gradient, radius=0.1, leaves=leaves):
        before = core.uploads()
        leaves.saved = False
        backend.perturb(leaves, gradient, None, [radius], 4.0, from_start=False)
        return core.uploads() - before

    assert [uploads(a), uploads(a), uploads(a, 0.2)] == [2, 0, 0]  # numbers of few groups are no part of it
    assert [uploads(b), uploads(a), uploads(b)] == [1, 0, 0]  # both are kept
    core.use_stream(5)  # what one stream copied, another has not waited for
    assert [uploads(a), uploads(a)] == [2, 0]
    core.use_stream(0)
    assert uploads(a) == 0
    for graph in (8, 9):  # it repeats its copies: nothing of the cache may be in it, or from it
        core.capture(graph)
        assert [uploads(a), uploads(a)] == [2, 1]  # the pieces once in a graph
    core.capture(0)
    assert uploads(a) == 0
    assert [uploads(other) for other in others] == [1] * 40  # the oldest make room
    assert uploads(a) == 1
    # parameters that take part by turns, as with experts, keep their tables
    turns = [base.Block(params[i : i + 1], [0], backup[i : i + 1]) for i in (0, 1)]
    assert [uploads(a[i : i + 1], leaves=turns[i]) for i in (0, 1, 0, 1)] == [2, 2, 0, 0]


def test_numbers_of_many_groups_are_copied_only_when_they_change(core):
    backend = emulated.backend()
    params, backup, a, buffers = lists(4, [(5,)] * 20)
    leaves, d = base.Block(params, list(range(20)), backup, True), base.Direction([a], [[1.0] * 20])

    def uploads(row):
        before = core.uploads()
        backend.update(leaves, d, "sgd", [buffers], [row] * 20, [(0.0,)], [0] * 20)
        return core.uploads() - before

    assert [uploads(SGD_ROW), uploads(SGD_ROW), uploads((0.2, *SGD_ROW[1:])), uploads(SGD_ROW)] == [2, 0, 1, 0]


def test_the_allocator_hears_of_gradients_and_backup(core, monkeypatch):
    """They are freed soon, and may have been allocated for another stream."""
    emulated.use(monkeypatch)
    weight = torch.nn.Parameter(torch.randn(50))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1, momentum=0.9)
    core.forget_records()
    addresses = []
    for _ in optimizer.passes():
        weight.grad = torch.randn(50)  # whose memory is the optimizer's to take
        addresses.append(weight.grad.data_ptr())
    assert all(core.was_recorded(address) for address in addresses)
    assert not core.was_recorded(weight.data_ptr())


def test_the_allocator_hears_once_of_each_stream(core):
    backend = emulated.backend()
    params, backup, a = lists(3, [(100,), (5, 7)])
    leaves, gradients = base.Block(params, [0, 0], backup, True), backend.bookkeeping.hold(a)

    def is_recorded(stream, tensors):
        core.use_stream(stream)
        core.forget_records()
        backend.square_norm(leaves, tensors)
        backend.perturb(leaves, tensors, None, [0.1], 4.0, from_start=True)
        return [core.was_recorded(tensor.data_ptr()) for tensor in tensors]

    assert [is_recorded(stream, gradients) for stream in (0, 0, 5, 0)] == [
        [True] * 2,
        [False] * 2,
        [True] * 2,
        [True] * 2,
    ]
    assert is_recorded(0, a) == [True] * 2  # a list that is not held may have other tensors each time
    small = backend.allocate(params)  # which lie in one block of memory
    assert is_recorded(0, small) == [True, False]


@pytest.mark.parametrize("base_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_step_waits_for_the_device_once_when_its_update_is_prepared(core, monkeypatch, base_class):
    emulated.use(monkeypatch)
    done = []

    def noted(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (done.append(name), original(*args))[1])

    noted(sums, "is_finite")
    for name in ("takes_state", "update"):
        noted(emulated.backend_class(), name)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = gam_fast.GAM(model.parameters(), base_class, lr=0.1, model=model)
    x = torch.randn(4, 2)
    optimizer.step(lambda: model(x).exp().sum().backward())
    fused = base_class is not torch.optim.RMSprop  # by torch
    assert done == (["takes_state", "is_finite", "update"] if fused else ["is_finite"])
    before, state = copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    for bad in range(4):
        factors = iter([float("inf") if i == bad else 1.0 for i in range(4)])
        with pytest.raises(gam_fast.NonFiniteGradientError, match="a pass of GAM"):
            optimizer.step(lambda factors=factors: (next(factors) * model(x).exp().sum()).backward())
        torch.testing.assert_close(
            [model.state_dict(), optimizer.state_dict()["state"]], [before, state], rtol=0, atol=0
        )
    assert done.count("update") == fused


def test_a_chain_counts_no_step_that_is_not_taken(core, monkeypatch):
    """The first of its members has no gradient, and so nothing to update."""
    from pytorch_optimizer import Lion

    emulated.use(monkeypatch)
    unused, used = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    lion = Lion([unused], lr=0.1)
    optimizer = gam_fast.SAM(None, [lion, torch.optim.SGD([used], lr=0.1)])
    optimizer.step(lambda: used.square().sum().backward())
    before = lion.param_groups[0].get("step")
    with pytest.raises(gam_fast.NonFiniteGradientError):
        optimizer.step(lambda: (float("inf") * used.square().sum()).backward())
    assert lion.param_groups[0].get("step") == before


# The emulator itself

PLANTED = {
    "none": ("", "", "", ""),
    "a removed barrier": ("reduce.cuh", "  __syncthreads();\n", "", "norm"),
    "a tail that is one long": ("arrays.cuh", "k < piece.length; ++k", "k <= piece.length; ++k", "moved"),
    "a barrier that some reach": ("reduce.cuh", "  __syncthreads();", "  if (warp) __syncthreads();", "barrier"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(tmp_path, bug):
    """A test of the tests: a copy of the kernels with one mistake, in a small program of its own."""
    name, old, new, found = PLANTED[bug]
    for folder in (emulated.ROOT / "csrc", emulated.EMULATOR):
        shutil.copytree(folder, tmp_path / folder.relative_to(emulated.ROOT))
    copied = tmp_path / emulated.EMULATOR.relative_to(emulated.ROOT)
    if name:
        place = tmp_path / "csrc" / "cuda" / name
        text = place.read_text(encoding="utf-8")
        assert old in text, "the place of the mistake has moved"
        place.write_text(text.replace(old, new), encoding="utf-8")
    program = tmp_path / "planted"
    include = [f"-I{path}" for path in (tmp_path / "csrc", copied, *cpp_extension.include_paths())]
    flags = ["-std=c++17", "-O0", "-mfma", "-ffp-contract=off", f"-include{copied}/few_dtypes.h"]
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *flags, *include, str(Path(__file__).parent / "native" / "planted.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    output = ""
    for order in ("fwd", "rand:1"):
        done = subprocess.run([str(program), order], capture_output=True, text=True, timeout=120)
        output += done.stdout + done.stderr
    assert re.search(f"wrong: .*({found})", output) if found else not output, output
