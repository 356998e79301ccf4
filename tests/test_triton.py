"""Tests of the Triton backend that need neither a GPU nor the interpreter: selection and tables."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from ranks import in_a_process

pytest.importorskip("triton", minversion="3.6", reason="needs Triton 3.6 or newer")

from gam_fast import backends
from gam_fast.backends import base, launches, probe, tables, triton

CUDA = torch.device("cuda", 0)
INSTALL = "pip install triton on Linux, or a build of torch for CUDA or ROCm"


# Selection


def test_triton_is_not_imported_before_a_gpu_needs_it():
    program = """
import sys, torch, gam_fast
print("triton" in sys.modules)
weight = torch.nn.Parameter(torch.ones(3))
gam_fast.GAM([weight], torch.optim.SGD, lr=0.1).step(lambda: weight.square().sum().backward())
print("gam_fast.kernels.sums" in sys.modules)  # torch's own optimizers import Triton themselves
"""
    assert in_a_process(program) == "False\nFalse\n"


def test_why_it_is_not_taken_on_a_cpu():
    with pytest.raises(RuntimeError, match="not available for cpu: .* GPUs; with TRITON_INTERPRET=1 .* or 'eager'"):
        backends.select("triton", torch.device("cpu"))


def test_without_triton_the_others_work():
    program = """
import sys, torch
sys.modules["triton"] = None
from gam_fast import backends
print(backends._classes()["triton"])
print(backends._classes()["eager"].refusal(torch.device("cuda")))
"""
    assert in_a_process(program) == f"Triton is not installed: {INSTALL}\nNone\n"


@pytest.mark.parametrize(("core", "books"), [("torch", "gam_fast._C"), ("None", "gam_fast.ownership")])
def test_gradients_are_taken_by_the_core_if_there_is_one(core, books):
    program = f"""
import sys, torch
if not {core}:
    sys.modules["gam_fast._C"] = None
from gam_fast.backends.triton import TritonBackend
print(TritonBackend().bookkeeping.__name__)
"""
    assert in_a_process(program) == f"{books}\n"


@pytest.mark.parametrize(("hip", "oldest"), [(None, "3.6"), ("6.4", "3.7")])
def test_an_old_triton_is_a_reason(monkeypatch, hip, oldest):
    monkeypatch.setattr(probe, "_reasons", {})
    monkeypatch.setattr("triton.__version__", "3.5.1" if hip is None else "3.6.0")
    monkeypatch.setattr(torch.version, "hip", hip)
    assert f"is too old: {oldest} or newer is needed" in triton.TritonBackend.refusal(CUDA)


def test_a_gpu_without_the_core_gets_triton(monkeypatch):
    classes = {**backends._classes(), "native": "not built"}
    monkeypatch.setattr(backends, "_classes", lambda: classes)
    monkeypatch.setattr(triton, "why_unusable", lambda device: None)
    assert backends.select("auto", CUDA).name == "triton"
    assert backends.select("auto", torch.device("cpu")).name == "eager"
    assert backends.select("auto", torch.device("mps")).name == "eager"


@pytest.mark.parametrize(("before", "after", "device"), [("0", "1", "cpu"), ("on", "0", "cuda")])
def test_a_late_change_of_the_environment_is_a_reason(before, after, device):
    """The kernels would be interpreted where they are compiled, or the other way round: with addresses of a GPU."""
    program = f"""
import os, torch, triton.language
from gam_fast import backends
os.environ["TRITON_INTERPRET"] = {after!r}
print(backends._classes()["triton"].refusal(torch.device({device!r})))
"""
    (reason,) = in_a_process(program, TRITON_INTERPRET=before).splitlines()
    assert reason.startswith("TRITON_INTERPRET was changed after Triton had been imported")


def test_a_gpu_where_no_kernel_can_be_run_is_refused_and_one_that_is_full_tried_again(monkeypatch):
    found = [torch.OutOfMemoryError("full"), RuntimeError("Failed to find C compiler.\nPlease specify one")]

    def fail(device):
        raise found.pop(0)

    monkeypatch.setattr(probe, "_reasons", {})
    monkeypatch.setattr(probe, "_adds_up", fail)
    reasons = [triton.TritonBackend.refusal(CUDA) for _ in range(3)]
    failed = "Triton does not work there: RuntimeError: Failed to find C compiler."
    assert reasons == ["Triton could not be tried: full", failed, failed]
    monkeypatch.setattr(probe, "_reasons", {})
    for works in (True, False):
        probe._reasons.clear()
        monkeypatch.setattr(probe, "_adds_up", lambda device, works=works: works)
        assert (triton.TritonBackend.refusal(CUDA) is None) == works


# Tables


@pytest.fixture
def device(monkeypatch):
    """A stand-in for a GPU that keeps copies in the memory of the CPU and counts them."""
    fake = SimpleNamespace(stream=1, capturing=False, copies=[])

    def copies(values, device, capturing):
        if values:
            fake.copies.append(capturing)
        return [value.clone() for value in values]

    monkeypatch.setattr(tables, "copies", copies)
    monkeypatch.setattr(tables.Tables, "_is_like", lambda *_: True)
    monkeypatch.setattr(tables, "graph_memory", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=fake.stream))
    return fake


def made(sizes=((9_000,), (4, 5)), groups=(0, 1), device=CUDA):
    params = [torch.zeros(size) for size in sizes]
    table = tables.Tables(base.Block(params, list(groups)))
    table.device = device
    return table, params


def test_a_table_is_copied_once_and_numbers_when_they_change(device):
    table, params = made()
    grads, others = ([torch.ones_like(p) for p in params] for _ in range(2))
    found = []

    def copies(numbers=(0.1, 0.2, 0.3), a=grads):
        device.copies.clear()
        lists = [tables.Argument("params", params, written=True), tables.Argument("a", a)]
        prepared = table.prepare(lists, [list(numbers), [1.0]])
        assert [n.tolist()[: len(numbers)] for n in prepared.numbers] == [list(numbers), [1.0, 0.0][: len(numbers)]]
        found.append(prepared.table)
        return len(device.copies)

    assert [copies(), copies()] == [1, 0]
    assert [copies((0.1, 0.2, 0.4)), copies()] == [1, 0]  # the numbers of before are still there
    assert all(each is found[0] for each in found)
    assert [copies(a=others), copies()] == [1, 0]
    for stream, expected in ((2, 1), (1, 0)):
        device.stream = stream
        assert copies() == expected


def test_a_captured_launch_has_a_table_of_its_own(device):
    table, params = made()
    lists = [tables.Argument("params", params)]
    kept = table.prepare(lists)
    device.capturing = True
    device.copies.clear()
    first, second = table.prepare(lists), table.prepare(lists)
    assert device.copies == [True, True]
    assert first.table is not second.table
    assert first.pieces.data_ptr() == second.pieces.data_ptr() == kept.pieces.data_ptr()  # which never change
    assert [tensor.data_ptr() for tensor in tables.graph_memory] == [kept.pieces.data_ptr()] * 2
    device.capturing = False
    device.copies.clear()
    assert table.prepare(lists).table is kept.table
    assert device.copies == []


def test_tables_do_not_pile_up(device):
    table, params = made()
    lists = [[torch.zeros_like(p) for p in params] for _ in range(4 * tables.KEPT)]
    for tensors in lists:
        table.prepare([tables.Argument("a", tensors)], [[0.5]])
    assert len(table._kept) == tables.KEPT


def test_the_words_of_a_table():
    table, params = made(((9_000,), (4, 5), (0,)), (1, 0, 1), torch.device("cpu"))
    lists = [
        tables.Argument("params", params),
        tables.Argument("a", [torch.zeros(9_001)[1:], torch.zeros(4, 5), torch.zeros(0)]),
        tables.Argument("none", None),
        tables.Argument("some", [None, torch.zeros(4, 5), None]),
    ]
    prepared = table.prepare(lists, [[1.0, 2.0, 3.0]], option=[7, 8, 9])
    assert prepared.programs == 3
    assert prepared.pieces.view(-1, 3).tolist() == [[1, 0, 20], [0, 0, 8192], [0, 8192, 808]]
    assert prepared.starts.tolist() == [0, 1, 3]
    assert prepared.whole.tolist() == [0, 3]
    assert (prepared.width, prepared.dtype) == (7, "float32")
    first, second, third = prepared.table.view(3, 7).tolist()
    assert first[:3] == [1, 7, 0]  # not packed: the second array is not aligned to 16 bytes
    assert second[:3] == [0, 8, 1]
    assert third[:3] == [1, 9, 1]
    assert first[3:] == [params[0].data_ptr(), lists[1].tensors[0].data_ptr(), 0, 0]
    assert third[3:] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "build",
    [
        lambda: torch.zeros(2, 3, 4, 5),
        lambda: torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        lambda: torch.zeros(6, 4).T,
        lambda: torch.zeros(1, 6, 1).transpose(0, 2),
        lambda: torch.zeros(4, 0, 2),
    ],
)
def test_dense_tensors_of_any_order_are_taken(build):
    params, like = build(), build()
    table = tables.Tables(base.Block([params], [0]))
    strides = [99 if n == 1 else step for n, step in zip(like.size(), like.stride(), strict=True)]
    table.prepare([tables.Argument("params", [params]), tables.Argument("a", [like.as_strided(like.size(), strides)])])


# Ahead of time


@pytest.mark.parametrize("name", ["moves.perturb", "sums.sums", "sums.totals", "updates.update"])
def test_a_kernel_can_be_launched_with_its_arguments_names(name):
    """Triton writes a function of these names and its own, which only a launch on a GPU does."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    module, function = name.split(".")
    kernel = getattr(importlib.import_module(f"gam_fast.kernels.{module}"), function)
    names = [parameter.name for parameter in kernel.params]
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    bound, _, options = bind(*range(2, 2 + len(names)), num_warps=4)
    assert bound == dict(zip(names, range(2, 2 + len(names)), strict=True))
    assert options == {"num_warps": 4}


def test_narrow_accesses_would_be_found(monkeypatch):
    """A test of `make aot`, which compiles every kernel for every GPU."""
    from tools import aot

    monkeypatch.setattr(
        aot, "VARIANTS", [variant for variant in aot.VARIANTS if variant.kernel is aot.moves.perturb][:1]
    )
    assert not any(wrong for _, _, wrong in aot.check("sm_90"))
    monkeypatch.setattr(aot, "vectors", lambda variant, dtype, shape: (variant.reads, variant.writes))
    found = aot.check("sm_90", of_updates=launches.Shape(128, 128))
    assert any("0 loads and 0 stores of 16 bytes" in wrong for _, _, wrong in found)
