"""What of the Triton backend needs neither a GPU nor the interpreter: selection, tables, compilation ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", minversion="3.6", reason="needs Triton 3.6 or newer")

from gam_fast import backends
from gam_fast.backends import base, launches, probe, tables, triton

CUDA = torch.device("cuda", 0)


def run(program, **environment):
    """The output of a program in a process of its own."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


# Selection


def test_triton_is_not_imported_before_a_gpu_needs_it():
    program = """
import sys, torch, gam_fast
print("triton" in sys.modules)
weight = torch.nn.Parameter(torch.ones(3))
gam_fast.GAM([weight], torch.optim.SGD, lr=0.1).step(lambda: weight.square().sum().backward())
print("gam_fast.kernels.sums" in sys.modules)  # torch's own optimizers import Triton themselves
"""
    assert run(program) == ["False", "False"]


def test_why_it_is_not_taken_on_a_cpu():
    with pytest.raises(RuntimeError) as raised:
        backends.select("triton", torch.device("cpu"))
    assert str(raised.value) == (
        "backend='triton' is not available for cpu: the Triton kernels run on tensors of NVIDIA and AMD GPUs; with "
        "TRITON_INTERPRET=1 in the environment on CPU tensors, slowly; use 'auto' or 'eager'"
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("sys.modules['triton'] = None", "Triton is not installed: pip install triton"),
        ("import triton; triton.__version__ = '3.3.1'", "Triton 3.3.1 is too old: 3.6 or newer is needed"),
        ("sys.modules['triton.language'] = None", "Triton does not work there: ModuleNotFoundError: "),
    ],
)
def test_a_triton_that_is_of_no_use_is_a_reason(spoil, reason):
    program = f"""
import sys, torch
{spoil}
from gam_fast import backends
found = backends._classes()["triton"]
print(found if isinstance(found, str) else found.refusal(torch.device("cuda")))
print(backends._classes()["eager"].refusal(torch.device("cuda")))
"""
    found = run(program)
    assert found[0].startswith(reason)
    assert found[1] == "None"


def test_a_gpu_without_the_core_gets_triton(monkeypatch):
    classes = {**backends._classes(), "native": "not built"}
    monkeypatch.setattr(backends, "_classes", lambda: classes)
    monkeypatch.setattr(triton, "why_unusable", lambda device: None)
    assert backends.select("auto", CUDA).name == "triton"
    assert backends.select("auto", torch.device("cpu")).name == "eager"
    assert backends.select("auto", torch.device("mps")).name == "eager"


def test_the_interpreter_says_where_it_runs():
    program = f"""
import sys, torch
from gam_fast import backends
sys.path.insert(0, {os.path.dirname(__file__)!r})
import interpreted  # Triton 3.6 does not work with NumPy 2.4
print(backends.select("triton", torch.device("cpu")).name, backends.select("auto", torch.device("cpu")).name)
print(backends.available()["triton"].reason)
print(backends._classes()["triton"].refusal(torch.device("cuda")))
"""
    names, reason, refusal = run(program, TRITON_INTERPRET="1")
    assert names.startswith("triton ")
    assert not names.endswith("triton")
    assert reason.endswith("in its interpreter on CPU tensors")
    assert refusal == "TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors only"


@pytest.mark.parametrize(("before", "after", "device"), [("0", "1", "cpu"), ("1", "0", "cuda"), ("on", "off", "cuda")])
def test_a_late_change_of_the_environment_is_a_reason(before, after, device):
    """The kernels would be interpreted where they are compiled, or the other way round: with addresses of a GPU."""
    program = f"""
import os, torch, triton.language
from gam_fast import backends
os.environ["TRITON_INTERPRET"] = {after!r}
print(backends._classes()["triton"].refusal(torch.device({device!r})))
"""
    (reason,) = run(program, TRITON_INTERPRET=before)
    assert reason.startswith("TRITON_INTERPRET was changed after Triton had been imported")


def test_a_gpu_where_no_kernel_can_be_run_is_refused(monkeypatch):
    tried = []

    def fail(device):
        tried.append(device)
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(probe, "_reasons", {})
    monkeypatch.setattr(probe, "_adds_up", fail)
    for _ in range(2):
        assert triton.TritonBackend.refusal(CUDA) == (
            "Triton does not work there: RuntimeError: Failed to find C compiler."
        )
    assert tried == [CUDA]


def test_a_gpu_that_is_full_for_the_moment_is_tried_again(monkeypatch):
    found = iter([torch.OutOfMemoryError("full"), True])

    def adds_up(device):
        result = next(found)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(probe, "_reasons", {})
    monkeypatch.setattr(probe, "_adds_up", adds_up)
    assert triton.TritonBackend.refusal(CUDA) == "Triton could not be tried: full"
    assert triton.TritonBackend.refusal(CUDA) is None


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


def made(sizes=((9_000,), (4, 5)), groups=(0, 1)):
    params = [torch.zeros(size) for size in sizes]
    table = tables.Tables(base.Block(params, list(groups)))
    return table, params


def test_a_table_is_copied_once_and_numbers_when_they_change(device):
    table, params = made()
    table.device = CUDA
    grads = [torch.ones_like(p) for p in params]
    lists = [tables.Argument("params", params, written=True), tables.Argument("a", grads)]

    def prepare(numbers=(0.1, 0.2, 0.3)):
        device.copies.clear()
        prepared = table.prepare(lists, [list(numbers), [1.0]])
        assert [n.tolist()[: len(numbers)] for n in prepared.numbers] == [list(numbers), [1.0, 0.0][: len(numbers)]]
        return prepared, len(device.copies)

    first, count = prepare()
    assert count == 1
    assert prepare()[1] == 0
    assert prepare()[0].table is first.table
    changed, count = prepare((0.1, 0.2, 0.4))
    assert count == 1
    assert changed.table is first.table
    assert prepare()[1] == 0  # the numbers of before are still there
    lists[1] = tables.Argument("a", [g.clone() for g in grads])
    assert prepare()[1] == 1
    lists[1] = tables.Argument("a", grads)
    assert prepare()[1] == 0
    device.stream = 2
    assert prepare()[1] == 1
    device.stream = 1
    assert prepare()[1] == 0


def test_a_captured_launch_has_a_table_of_its_own(device):
    table, params = made()
    table.device = CUDA
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
    table.device = CUDA
    lists = [[torch.zeros_like(p) for p in params] for _ in range(4 * tables.KEPT)]
    for tensors in lists:
        table.prepare([tables.Argument("a", tensors)], [[0.5]])
    assert len(table._kept) == tables.KEPT


def test_the_words_of_a_table():
    table, params = made(((9_000,), (4, 5), (0,)), (1, 0, 1))
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


@pytest.mark.parametrize("build", [lambda: torch.zeros(4, 10)[:, ::2], lambda: torch.zeros(1).expand(3)])
def test_parameters_with_gaps_or_overlaps_are_refused(build):
    with pytest.raises(ValueError, match=r"params\[1\] must be dense in memory"):
        tables.Tables(base.Block([torch.zeros(3), build()], [0, 0]))


def test_parameters_of_several_dtypes_are_refused():
    with pytest.raises(TypeError, match="parameters must be of one dtype .* got torch.float32, torch.float64"):
        tables.Tables(base.Block([torch.zeros(3), torch.zeros(3).double()], [0, 0]))


def test_parameters_that_overlap_are_refused():
    memory = torch.zeros(12)
    params = [memory[4:], memory[:0], memory[:5]]
    with pytest.raises(ValueError, match=r"params\[0\] and params\[2\] must not overlap in memory"):
        tables.Tables(base.Block(params, [0, 0, 0])).prepare([tables.Argument("params", params, written=True)])


def test_memory_that_was_taken_away_is_refused():
    table, _ = made(((8,),), (0,))
    values = torch.zeros(8)
    values.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"a\[0\] must be .* with its elements in memory .* in 0 bytes"):
        table.prepare([tables.Argument("a", [values])])


# Ahead of time

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")


@pytest.mark.parametrize("name", TARGETS)
def test_kernels_compile_and_use_the_widest_accesses(name):
    """In fp32; `make aot` does all types."""
    from tools import aot

    found = aot.check(name, ("float32",))
    assert {what.split()[0] for what, _, _ in found} == {
        "sums", "totals", "perturb", "sgd", "adam", "lion", "assign",
    }  # fmt: skip
    assert [what for what, _, wrong in found if wrong] == []


def test_narrow_accesses_would_be_found(monkeypatch):
    from tools import aot

    narrow = launches.Shape(128, 128)
    monkeypatch.setattr(aot, "vectors", lambda variant, dtype, shape: (variant.reads, variant.writes))
    found = aot.check("sm_90", ("float32",), of_updates=narrow)
    assert any("0 loads and 0 stores of 16 bytes" in wrong for _, _, wrong in found)
