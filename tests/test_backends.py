"""Each primitive against its formula in fp64, for every dtype, layout and branch."""

from __future__ import annotations

import re
import subprocess
import sys

import emulated
import pytest
import torch
from cases import BACKENDS, DTYPES, EMULATED, INTERPRETED, pairwise
from primitives import AdamGroup, SGDGroup, adam, lion, sgd

import gam_fast
from gam_fast import backends
from gam_fast.backends import base, eager

# The last is cut into pieces, by every backend; Triton's interpreter takes milliseconds for each.
SHAPES = [(3, 5), (), (0,), (21 if INTERPRETED else 70, 401), (2, 8, 4, 4), (1, 9_000 if INTERPRETED else 30_000)]
GROUPS = [0, 1, 0, 1, 0, 1]


def tensors(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    result = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    result[4] = result[4].contiguous(memory_format=torch.channels_last)
    result[3] = torch.randn(SHAPES[3][0] * 401 + 1, generator=generator).to(dtype)[1:].view(SHAPES[3])  # not aligned
    return result


def leaves(dtype, saved=False):
    params = tensors(dtype, 1)
    backup = tensors(dtype, 2) if saved else [torch.empty_like(p) for p in params]
    return base.Block(params, list(GROUPS), backup, saved)


def double(values):
    return [v.double() for v in values]


def device_scalar(value):
    """As an accelerator gets it."""
    return torch.tensor(value, dtype=torch.float64)


def as_handed_to(backend, number):
    """As the engine hands sums over: to the core's loops on a CPU as numbers only."""
    return float if number is device_scalar and type(backend).__name__ == "NativeBackend" else number


def named(value):
    return value.__name__ if callable(value) else str(value)


def close(actual, expected, dtype, scale=1.0):
    """Within the rounding of one store and of a few operations in the working precision, at the operands' size."""
    working = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    eps = torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        if a.numel():
            size = float(e.abs().max()) + scale
            assert float((a.double() - e).abs().max()) <= 0.5 * eps * size + 16 * working * size


def instruction_sets():
    """The native backend once for each set of loops that runs here; by its name alone where it is missing, to fail."""
    try:
        from gam_fast import _C
    except ImportError:
        return ["native"]
    return [f"native-{name}" for name in _C.instruction_sets()]


NAMES = [name for name in BACKENDS if name != "native"]


@pytest.fixture(params=[*NAMES, *(instruction_sets() if "native" in BACKENDS else []), *EMULATED])
def backend(request, monkeypatch):
    monkeypatch.setattr(eager, "CPU_CHUNK", 1 << 13)  # so that leaves are cut
    if request.param == "emulated":
        yield emulated.backend()
        return
    name, _, instruction_set = request.param.partition("-")
    if not instruction_set:
        yield backends.select(name, torch.device("cpu"))
        return
    from gam_fast import _C

    best = _C.instruction_set()
    _C.use_instruction_set(instruction_set)
    yield backends.select(name, torch.device("cpu"))
    _C.use_instruction_set(best)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("eta", "saved", "difference"), pairwise([None, [0.0, 0.1]], [False, True], [False, True]), ids=named
)
def test_square_norm(backend, dtype, eta, saved, difference):
    target = leaves(dtype, saved)
    a, b = tensors(dtype, 3), tensors(dtype, 4)
    weights = target.backup if saved else target.params
    expected = 0.0
    for x, y, w, g in zip(double(a), double(b), double(weights), GROUPS, strict=True):
        v = x - y if difference else x
        expected = expected + ((v if eta is None else (w.abs() + eta[g]) * v) ** 2).sum()
    actual = backend.square_norm(target, a, b if difference else None, eta)
    assert actual.dim() == 0
    assert actual.dtype == torch.float64
    # rows of 1,024 in the working precision, then fp64
    torch.testing.assert_close(actual, expected, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0.0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_square_norm_of_a_large_fp32_tensor_is_accurate(layout):
    """Whole chunks summed in fp32 would be off by 1e-5."""
    values = torch.rand(16, 128, 32, 32) + 0.1
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        values = values.view(2048, 1024).T
    target = base.Block([torch.empty_like(values)], [0])
    actual = eager.EagerBackend().square_norm(target, [values])
    torch.testing.assert_close(actual, values.double().square().sum(), rtol=2e-6, atol=0.0)


def test_square_norm_of_fp16_does_not_overflow(backend):
    target = base.Block([torch.full((70_000,), 200.0, dtype=torch.float16)], [0])
    assert float(backend.square_norm(target, target.params)) == pytest.approx(70_000 * 200.0**2, rel=1e-6)


def test_square_norm_is_the_square_of_what_clip_grad_norm_finds(backend):
    params = [torch.nn.Parameter(t) for t in tensors(torch.float32, 1)]
    for p, g in zip(params, tensors(torch.float32, 3), strict=True):
        p.grad = g.clone()
    total = torch.nn.utils.get_total_norm([p.grad for p in params])
    norm = backend.square_norm(leaves(torch.float32), tensors(torch.float32, 3)).sqrt()
    torch.testing.assert_close(norm.float(), total, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("eta", "saved", "from_start", "difference", "number"),
    pairwise([None, [0.0, 0.1]], [False, True], [False, True], [False, True], [float, device_scalar]),
    ids=named,
)
def test_perturb(backend, dtype, eta, saved, from_start, difference, number):
    target = leaves(dtype, saved)
    number = as_handed_to(backend, number)
    a, b = tensors(dtype, 3), tensors(dtype, 4)
    before = [p.clone() for p in target.params]
    start = [t.clone() for t in (target.backup if saved else target.params)]
    radius, square = [0.5, -0.25], 7.0
    into, other = tensors(dtype, 5), tensors(dtype, 6)
    fold = base.FoldInto(into, other, [0.5, 2.0], [-1.0, 0.25])
    folded = [
        k * x + m * y
        for x, y, k, m in zip(
            double(into), double(other), [fold.k[g] for g in GROUPS], [fold.l[g] for g in GROUPS], strict=True
        )
    ]
    expected = []
    for x, y, w, p, g in zip(double(a), double(b), double(start), double(before), GROUPS, strict=True):
        v = x - y if difference else x
        t = 1.0 if eta is None else w.abs() + eta[g]
        expected.append((w if from_start else p) + radius[g] / (7.0**0.5 + 1e-12) * t * t * v)
    backend.perturb(
        target, a, b if difference else None, radius, number(square), from_start=from_start, eta=eta, fold=fold
    )
    assert target.saved
    for saved_value, value in zip(target.backup, start, strict=True):
        assert torch.equal(saved_value, value)
    close(target.params, expected, dtype, scale=8.0)
    close(into, folded, dtype, scale=8.0)
    backend.restore(target)
    for p, value in zip(target.params, start, strict=True):
        assert torch.equal(p, value)


def directions(dtype, terms=3, projected=True, clipped=True, number=float):
    """κ = 0.7; the formula of ‖d‖ has groups of their own γ."""
    lists = [tensors(dtype, 10 + t) for t in range(terms)]
    p = [[0.5 + t, -0.25 * t] for t in range(terms)]
    q = [[0.1 * t, 0.3] for t in range(terms)] if projected else None
    products, gamma = [[6.0, 5.0, 7.0], [4.0, 2.0, 3.0]], [0.1, 0.4]
    square = 0.0
    for (uu, um, mm), g in zip(products, gamma, strict=True):
        g, a = (g, 1.0 + 0.7 * g) if projected else (0.0, 1.0)
        square += a * a * uu - 2 * a * g * um + g * g * mm
    scale = min(1.0, 0.9 / (square**0.5 + 1e-6)) if clipped else 1.0
    made = products if number is float else torch.tensor(products, dtype=torch.float64)
    d = base.Direction(lists, p, q, made, gamma, 0.9 if clipped else None)
    expected = []
    for i, g in enumerate(GROUPS):
        total = 0.0
        for t in range(terms):
            total = total + (p[t][g] + (0.7 * q[t][g] if q else 0.0)) * lists[t][i].double()
        expected.append(total * scale)
    return d, expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("with_m", [False, True])
def test_inner_products(backend, dtype, terms, with_m):
    target = leaves(dtype)
    u, u_values = directions(dtype, terms, projected=False, clipped=False)
    m = base.Direction(u.terms, [[-1.0, 0.5 * t] for t in range(terms)])
    m_values = [sum(m.p[t][g] * m.terms[t][i].double() for t in range(terms)) for i, g in enumerate(GROUPS)]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for x, y, g in zip(u_values, m_values, GROUPS, strict=True):
        expected[g] += torch.stack([(x * x).sum(), (x * y).sum() * with_m, (y * y).sum() * with_m])
    actual = backend.inner_products(target, u, m if with_m else None, 3)
    assert actual.shape == (3, 3)
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("saved", "own_storage", "form", "number"),
    pairwise(
        [False, True], [False, True], [(1, False, True), (2, False, False), (3, True, True)], [float, device_scalar]
    ),
    ids=named,
)
def test_direction(backend, dtype, saved, own_storage, form, number):
    target = leaves(dtype, saved)
    number = as_handed_to(backend, number)
    start = [t.clone() for t in (target.backup if saved else target.params)]
    d, expected = directions(dtype, *form, number)
    out = d.terms[0] if own_storage else [torch.empty_like(p) for p in target.params]
    backend.direction(target, d, out)
    close(out, expected, dtype, scale=4.0)
    for p, value in zip(target.params, start, strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_sgd(backend, dtype, first):
    target = leaves(dtype, saved=True)
    start = double(target.backup)
    d, values = directions(dtype)
    groups = [
        SGDGroup(0.1, 0.9, 0.25, 0.01, nesterov=False, maximize=False),
        SGDGroup(0.2, 0.0, 0.0, 0.02, nesterov=False, maximize=True),
    ]
    buffers = [t * (not first) if g == 0 else None for t, g in zip(tensors(dtype, 20), GROUPS, strict=True)]
    expected, expected_buffers = [], []
    for w, v, b, g in zip(start, values, buffers, GROUPS, strict=True):
        h = groups[g]
        v = (-v if h.maximize else v) + h.weight_decay * w
        if b is not None:
            v = v if first else h.momentum * b.double() + (1 - h.dampening) * v
        expected.append(w - h.lr * v)
        expected_buffers.append(v)
    sgd(backend, target, d, buffers, [first and b is not None for b in buffers], groups)
    close(target.params, expected, dtype, scale=8.0)
    kept = [(b, e) for b, e in zip(buffers, expected_buffers, strict=True) if b is not None]
    close([b for b, _ in kept], [e for _, e in kept], dtype, scale=8.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adam(backend, dtype):
    target = leaves(dtype, saved=True)
    start = double(target.backup)
    d, values = directions(dtype)
    groups = [
        AdamGroup(0.1, 0.9, 0.99, 1e-3, 0.01, decoupled=True, amsgrad=False, maximize=False),
        AdamGroup(0.2, 0.8, 0.95, 1e-2, 0.02, decoupled=False, amsgrad=True, maximize=True),
    ]
    average = tensors(dtype, 21)
    square = [t.abs() for t in tensors(dtype, 22)]
    largest = [t.abs() if g else None for t, g in zip(tensors(dtype, 23), GROUPS, strict=True)]
    steps = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    expected = []
    rows = zip(start, values, double(average), double(square), largest, steps, GROUPS, strict=True)
    for w, v, m, s, top, t, g in rows:
        h = groups[g]
        v = -v if h.maximize else v
        w = w * (1 - h.lr * h.weight_decay) if h.decoupled else w
        v = v if h.decoupled else v + h.weight_decay * w
        m = m + (1 - h.beta1) * (v - m)
        s = h.beta2 * s + (1 - h.beta2) * v * v
        root = (s if top is None else torch.maximum(s, top.double())).sqrt()
        step = h.lr / (1 - h.beta1**t) * m / (root / (1 - h.beta2**t) ** 0.5 + h.eps)
        expected.append((w - step, m, s))
    adam(backend, target, d, average, square, largest, steps, groups)
    for i, (w, m, s) in enumerate(expected):
        # The step divides by √v + ε, which magnifies the rounding of v where v is small; its own size is the scale.
        close([target.params[i]], [w], dtype, scale=64.0)
        close([average[i]], [m], dtype, scale=8.0)
        close([square[i]], [s], dtype, scale=64.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lion(backend, dtype):
    target = leaves(dtype, saved=True)
    d, values = directions(dtype)
    rows = [(0.1, 0.9, 0.99, 0.0, 0.75, 0.0), (0.2, 0.3, 0.4, 0.125, 1.0, 1.0)]
    average = tensors(dtype, 21)
    before = double(average)
    expected = []
    for w, v, m, g in zip(double(target.backup), values, before, GROUPS, strict=True):
        lr, beta1, beta2, decay, shrink, maximize = rows[g]
        v = (-v if maximize else v) + decay * w
        expected.append((w * shrink - lr * torch.sign(m + (1 - beta1) * (v - m)), m + (1 - beta2) * (v - m)))
    lion(backend, target, d, average, rows)
    close(target.params, [w for w, _ in expected], dtype, scale=8.0)
    close(average, [m for _, m in expected], dtype, scale=8.0)


def test_the_backend_does_nothing_on_an_unsaved_restore(backend):
    target = leaves(torch.float32)
    before = [p.clone() for p in target.params]
    backend.restore(target)
    for p, value in zip(target.params, before, strict=True):
        assert torch.equal(p, value)


def test_chunks_cover_every_element_once_and_keep_to_their_size():
    target = base.Block([torch.zeros(3, 1 << 20), torch.zeros(()), torch.zeros(5, 0), torch.zeros(9, 7)], [0, 0, 1, 1])
    found = eager.chunks(target)
    for chunk in found:
        assert chunk.numel <= eager.CPU_CHUNK
        for piece in chunk(target.params):
            piece.add_(1.0)
    for p in target.params:
        assert torch.equal(p, torch.ones_like(p))
    assert eager.chunks(target) is found
    target.params.append(torch.zeros(2))
    target.group.append(0)
    target.prepared = None
    assert sum(chunk.numel for chunk in eager.chunks(target)) == sum(p.numel() for p in target.params)


def test_an_empty_model_has_norm_zero(backend):
    target = base.Block([torch.zeros(0)], [0])
    assert float(backend.square_norm(target, [torch.zeros(0)])) == 0.0


def test_the_accumulator_is_fp32_where_there_is_no_fp64():
    assert base.accumulate_dtype(torch.device("mps")) == torch.float32


# Selection


def test_select(monkeypatch):
    cpu = torch.device("cpu")
    assert backends.select("auto", cpu).name == BACKENDS[-1]
    assert backends.select("auto", torch.device("meta")).name == "eager"
    for name, status in backends.available().items():
        if status.available:
            first, second = backends.select(name, cpu), backends.select(name, cpu)
            assert first.name == name
            assert first is not second
        else:
            with pytest.raises(RuntimeError, match=f"backend='{name}' is not available for cpu: "):
                backends.select(name, cpu)
    with pytest.raises(ValueError, match="unknown backend='quick': choose one of auto, native, triton, eager"):
        backends.select("quick", cpu)
    with pytest.raises(ValueError, match="unknown backend='fast': choose one of auto"):
        gam_fast.GAM([torch.nn.Parameter(torch.ones(1))], backend="fast")
    monkeypatch.setenv("GAM_FAST_BACKEND", "eager")
    assert backends.select("quick", cpu).name == "eager"
    monkeypatch.setenv("GAM_FAST_BACKEND", "slow")
    with pytest.raises(ValueError, match="unknown GAM_FAST_BACKEND=slow"):
        gam_fast.GAM([torch.nn.Parameter(torch.ones(1))], backend="eager")


def test_the_command_says_what_is_there_and_why_the_rest_is_not():
    command = [sys.executable, "-m", "gam_fast"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert f"gam_fast {gam_fast.__version__}, torch {torch.__version__}" in text
    for name, status in backends.available().items():
        assert f"{name:<8}{'available' if status.available else 'not available'}: {status.reason}" in text
    assert f"backend='auto' on cpu: {BACKENDS[-1]}" in text


BROKEN_CORE = """
import sys, warnings
from importlib.machinery import ExtensionFileLoader
from importlib.util import spec_from_file_location

class Finder:  # what an installed core is to the import system that another torch has moved away from
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "gam_fast._C":
            return spec_from_file_location(name, FILE, loader=ExtensionFileLoader(name, FILE))

sys.meta_path.insert(0, Finder)
import torch, gam_fast

def make(**options):
    return gam_fast.GAM([torch.nn.Parameter(torch.ones(1))], **options)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    make(backend="eager"), gam_fast.backends.available(), make(), make()
for warning in caught:
    print(f"{warning.category.__name__}: {warning.message}")
print(make().base, gam_fast.backends.available()["native"])
try:
    make(backend="native")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("stamp", ["Built for torch 2.5.1+cu124.", ""])
def test_a_core_of_another_torch_is_warned_of_once(tmp_path, stamp):
    """Once in a process, by the first optimizer that would have had it; both versions and the mend are named."""
    file = tmp_path / "_C.so"
    file.write_bytes(b"\x7fELF no library\0" + stamp.encode() + b"\0 and so on")
    done = _in_a_process(f"FILE = {str(file)!r}\n{BROKEN_CORE}")
    was = "2.5.1+cu124" if stamp else "another version"
    mend = rf"built for torch {re.escape(was)}, this is {re.escape(torch.__version__)}; pip install --no-build-iso"
    first, *rest = done.splitlines()
    assert re.search(rf"UserWarning: gam_fast runs without its compiled core.*{mend}.*backend='eager'", first)
    assert not any("UserWarning" in line for line in rest)
    assert re.search(rf"Status\(available=False.*{mend}", done)
    assert re.search(rf"backend='native' is not available for cpu: .*{mend}", done)


def test_a_core_that_loads_and_is_of_another_torch_is_warned_of_once():
    program = """
import sys, types, warnings
import torch
core = types.ModuleType("gam_fast._C")
core.torch_version, core.__file__ = "2.5.1", "/site-packages/gam_fast/_C.so"
sys.modules["gam_fast._C"] = core
import gam_fast
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        gam_fast.Base([torch.nn.Parameter(torch.ones(1))])
for warning in caught:
    print(warning.message)
"""
    (said,) = _in_a_process(program).splitlines()
    assert re.search(rf"torch 2.5.1, this is {re.escape(torch.__version__)}; pip install --no-build-iso", said)


def test_without_a_core_nothing_is_warned_of():
    """``GAM_FAST_BUILD=none``, or a processor or compiler for which there is none."""
    program = "import sys; sys.modules['gam_fast._C'] = None; import torch, gam_fast; "
    program += "print(gam_fast.GAM([torch.nn.Parameter(torch.ones(1))])._select(torch.device('cpu')).name)"
    assert _in_a_process(program) == "eager\n"


def _in_a_process(program):
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
