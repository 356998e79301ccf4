"""Each primitive on each backend, in each dtype, against its formula in fp64; kernels have the bits of the CPU core."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from types import SimpleNamespace

import emulated
import pytest
import torch
from cases import BACKENDS, DTYPES, EMULATED, INTERPRETED, WITHOUT_CORE
from primitives import CASES, SUMS, Formulas, Lists, Place, assert_close, same_bits
from ranks import in_a_process
from torch.testing._internal.two_tensor import TwoTensor

import gam_fast
from gam_fast import backends
from gam_fast.backends import base, eager

CPU = torch.device("cpu")
INF, NAN = float("inf"), float("nan")
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a real GPU"),
]


def instruction_sets():
    """The native backend once for each set of loops that runs here; by its name alone where it is missing, to fail."""
    try:
        from gam_fast import _C
    except ImportError:
        return ["native"]
    return [f"native-{name}" for name in _C.instruction_sets()]


GPU = [] if INTERPRETED else [pytest.param(f"{name}-cuda", marks=ON_A_GPU) for name in ("native", "triton")]
KERNELS = [*(name for name in BACKENDS if name != "eager"), *EMULATED, *GPU]
EACH = [*(name for name in BACKENDS if name == "eager"), *KERNELS]
SETS = instruction_sets() if "native" in BACKENDS else []
EVERY = [*(name for name in EACH if name != "native"), *SETS, *(["eager-tensors"] if "eager" in BACKENDS else [])]
"""Native by each instruction set, and eager also with sums as on an accelerator."""


def on(names):
    return pytest.mark.parametrize("place", names, indirect=True)


@pytest.fixture
def place(request, monkeypatch):
    monkeypatch.setattr(eager, "CPU_CHUNK", 1 << 13)  # so that leaves are cut
    name, _, kind = request.param.partition("-")
    if name == "emulated":
        yield Place(emulated.backend(), takes_tensors=True)
    elif name != "native" or not kind or kind == "cuda":
        device = kind if kind == "cuda" else "cpu"
        yield Place(backends.select(name, torch.device(device)), device, name == "triton" or bool(kind))
    else:
        from gam_fast import _C

        best = _C.instruction_set()
        _C.use_instruction_set(kind)
        yield Place(backends.select(name, CPU))
        _C.use_instruction_set(best)


# Values


@functools.cache
def by_formulas(name, dtype):
    return CASES[name](Place(Formulas()), Lists(dtype, stored_as=torch.float64))


@functools.cache
def by_the_core(name, dtype):
    rounded, exact, _ = CASES[name](Place(backends.select("native", CPU)), Lists(dtype))
    return [*rounded, *exact]


def check(place, name, lists, expected):
    found = CASES[name](place, lists)
    assert lists.are_written_inside_only()
    for copy, value in zip(found.exact, expected.exact, strict=True):
        assert torch.equal(copy.cpu().double(), value)
    assert_close(found.rounded, expected.rounded, lists.dtype, found.scale)
    return [*found.rounded, *found.exact]


@on(EVERY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_primitive_is_its_formula_and_kernels_have_the_bits_of_the_core(place, dtype, name, request):
    found = check(place, name, Lists(dtype, device=place.device), by_formulas(name, dtype))
    where = request.node.callspec.params["place"]
    if WITHOUT_CORE or where.startswith("eager"):
        return
    is_sum = name.startswith(SUMS)
    if where == "native-baseline":  # has no fused operation, which sums of squares do not use
        same = name.startswith("square_norm")
    else:
        same = not is_sum or (where.startswith("native") and place.device == "cpu")
    assert not same or same_bits(found, by_the_core(name, dtype))


@on(KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(SUMS)])
def test_alignment_changes_no_bit_of_a_sum(place, dtype, name):
    """Which thread adds up which elements depends on their place in a tensor only."""
    plain, shifted = (CASES[name](place, Lists(dtype, device=place.device, shifted=far)) for far in (False, True))
    assert same_bits(plain.rounded, shifted.rounded)


@on(EACH)
@pytest.mark.parametrize("count", [17] if INTERPRETED else [1, 16, 17, 40])
def test_numbers_of_many_groups(place, count):
    """Up to 16 travel in the arguments of a kernel, more in a table."""
    options = {"shapes": [(5,)] * count, "groups": count}
    for name, case in CASES.items():
        expected = case(Place(Formulas()), Lists(torch.float32, stored_as=torch.float64, **options))
        check(place, name, Lists(torch.float32, device=place.device, **options), expected)


@on(EACH)
def test_a_model_without_elements(place):
    for case in CASES.values():
        rounded, exact, _ = case(place, Lists(torch.float32, [(0,), (3, 0)], place.device))
        assert all(not tensor.any() for tensor in (*rounded, *exact))


@on(EACH)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_sums_of_millions_are_as_exact_as_they_say(place, layout, monkeypatch):
    """Kernels to the bound of csrc/cuda/sums.cuh; whole chunks summed in fp32 would be off by 1e-5."""
    monkeypatch.setattr(eager, "CPU_CHUNK", 1 << 20)  # as it is
    values = torch.rand(4, 128, 32, 32, device=place.device) + 0.5
    if layout == "channels_last":
        values = values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        values = values.view(512, 1024).T
    total = place.backend.square_norm(base.Block([torch.empty_like(values)], [0]), [values])
    exact = values.double().square().sum()
    bound = 2e-6 if place.backend.name == "eager" else 9 * 2.0**-24
    assert abs(float(total / exact) - 1.0) < bound


@on(EACH)
def test_square_norm_of_fp16_does_not_overflow(place):
    values = [torch.full((70_000,), 200.0, dtype=torch.float16, device=place.device)]
    norm = place.backend.square_norm(base.Block(values, [0]), values)
    assert float(norm) == pytest.approx(70_000 * 200.0**2, rel=1e-6)


@on(EACH)
def test_numbers_that_are_not_finite_go_their_way(place):
    """As the formulas have it; a zero decay leaves infinite parameters, such as a mask's, as they are.

    An average of infinite numbers is what the backend makes of it.
    """
    start = torch.tensor([INF, -INF, 1.0, 1.0, -0.0, NAN, 1e-40, 1e18])
    grads = torch.tensor([0.0, 0.0, INF, NAN, 1.0, 1.0, 1e-40, 1e18])
    results = []
    for where, dtype in ((place, torch.float32), (Place(Formulas()), torch.float64)):
        found = []
        for formula, state, numbers, options in (
            ("sgd", [torch.zeros(8)], [0.1, 0.9, 0.0, 0.0, 1.0, 0.0], (0.0,)),
            ("adam", [torch.zeros(8), torch.ones(8), None], [0.9, 0.99, 1e-3, 0.0, 1.0, 0.0], (0.1, 1.0)),
            ("lion", [torch.zeros(8)], [0.1, 0.9, 0.99, 0.0, 1.0, 0.0], ()),
        ):
            gradient = grads if formula == "sgd" else grads.nan_to_num(1.0, 1.0)
            params, d = ([t.to(where.device, dtype, copy=True)] for t in (start, gradient))
            lists = [[t if t is None else t.to(where.device, dtype)] for t in state]
            block = base.Block(params, [0])
            where.backend.update(block, base.Direction([d], [[1.0]]), formula, lists, [numbers], [options], [0])
            found += [params[0].cpu().float()]
        results.append(found)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-44, equal_nan=True)


def test_the_accumulator_is_fp32_where_there_is_no_fp64():
    assert base.accumulate_dtype(torch.device("mps")) == torch.float32


# What is around the elements


@on(EACH)
def test_an_unsaved_block_is_not_restored(place):
    params = [torch.randn(3, device=place.device)]
    before = params[0].clone()
    place.backend.restore(base.Block(params, [0], [torch.zeros(3, device=place.device)]))
    assert torch.equal(params[0], before)


@on(EACH)
def test_memory_is_allocated_in_the_same_order(place):
    channels_last = torch.ones(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    like = [channels_last, torch.ones(3, 2).T, torch.ones(()), torch.ones(0, 3).bfloat16()]
    like = [tensor.to(place.device) for tensor in like]
    for made, tensor in zip(place.backend.allocate(like), like, strict=True):
        assert (made.shape, made.stride(), made.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


@on(EACH)
def test_autograd_hears_of_what_was_written(place):
    weight = torch.ones(3, requires_grad=True, device=place.device)
    kept = (weight * weight).sum()  # saves the weight
    gradient = torch.ones(3, device=place.device)
    version = gradient._version
    with torch.no_grad():
        block = base.Block([weight], [0], [torch.empty_like(gradient)])
        place.backend.perturb(block, [gradient], None, [1.0], place.sums(1.0), from_start=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    assert gradient._version == version


@on(KERNELS)
def test_state_of_another_dtype_or_order_is_not_taken(place):
    params = [torch.zeros(9, 3, device=place.device)]
    block = base.Block(params, [0])
    assert place.backend.takes_state(block, [params, [None]])
    for wrong in (params[0].double(), torch.zeros(3, 9, device=place.device).T):
        assert not place.backend.takes_state(block, [params, [wrong]])
        with pytest.raises((TypeError, ValueError), match=r"state\[0\]\[0\] must (have the dtype|be a plain tensor)"):
            place.backend.update(block, base.Direction([params], [[1.0]]), "sgd", [[wrong]], [[0.0] * 6], [[0.0]], [0])


# Bad input: the argument is named, and nothing is changed

SHARED = torch.ones(40)


def without_memory():
    tensor = torch.ones(5)
    tensor.untyped_storage().resize_(0)
    return tensor


def other_a(tensor):
    return lambda good: {"a": [good["a"][0], tensor]}


PLAIN = r"a\[1\] must be a plain tensor"
UNLIKE = r"a\[1\] must (have the dtype, shape and strides of|be a plain tensor .* as) its parameter"

BAD = {
    "too few": (lambda good: {"a": good["a"][:1]}, "a must have one tensor per parameter, that is 2, got 1"),
    "shape": (other_a(torch.ones(4)), UNLIKE),
    "dimensions": (other_a(torch.ones(5, 1)), UNLIKE),
    "dtype": (other_a(torch.ones(5).double()), UNLIKE),
    "device": (other_a(torch.ones(5, device="meta")), PLAIN),
    "sparse": (other_a(torch.ones(5).to_sparse()), PLAIN),
    "lazy view": (other_a(torch._neg_view(torch.ones(5))), PLAIN),
    "zero tensor": (other_a(torch._efficientzerotensor(5)), PLAIN),
    "subclass": (other_a(TwoTensor(torch.ones(5), torch.ones(5))), PLAIN),
    "no memory": (other_a(without_memory()), PLAIN),
    "strides": (lambda good: {"a": [torch.ones(4, 3).T, good["a"][1]]}, UNLIKE.replace("1", "0", 1)),
    "gaps": (other_a(torch.ones(10)[::2]), PLAIN),
    "expanded parameter": (
        lambda good: {"params": [torch.ones(4).expand(3, 4), good["params"][1]]},
        r"params\[0\] must be (a plain tensor .* dense in memory|dense)",
    ),
    "parameters that overlap": (
        lambda good: {"params": [SHARED[:12].view(3, 4), SHARED[11:16]]},
        r"params\[0\] and params\[1\] must not overlap in memory",
    ),
    "parameters of two dtypes": (
        lambda good: {"params": [good["params"][0], good["params"][1].double()]},
        "must (all )?be of one dtype",
    ),
    "integers": (
        lambda good: {"params": [p.int() for p in good["params"]], "a": [t.int() for t in good["a"]]},
        "of float64, float32, bfloat16 (or|and) float16",
    ),
    "parameters that require grad": (
        lambda good: {"params": [torch.nn.Parameter(p) for p in good["params"]]},
        r"params\[0\] requires grad and would be written: call under torch.no_grad\(\)",
    ),
    "no backup": (lambda good: {"backup": []}, "backup must have one tensor per parameter, that is 2, got 0"),
    "group": (lambda good: {"group": [0, -1]}, r"group(\[1\])? must be (the index|indices) of (a )?parameter group"),
    "radius": (lambda good: {"radius": [0.1]}, "radius must have one entry per parameter group, that is 2, got 1"),
    "eta": (lambda good: {"eta": [0.1]}, "eta must have one entry per parameter group, that is 2, got 1"),
    "fold": (
        lambda good: {"fold": base.FoldInto(good["a"][:1], good["a"], [1.0] * 2, [1.0] * 2)},
        "into must have one tensor per parameter, that is 2, got 1",
    ),
}


BY_THE_CORE = ("sparse", "group", "radius", "eta", "parameters that require grad")
"""Triton leaves these to the engine."""


@on([name for name in KERNELS if isinstance(name, str)])
@pytest.mark.parametrize("bad", [name for name in BAD if not INTERPRETED or name not in BY_THE_CORE])
def test_bad_lists_are_refused(place, bad):
    change, message = BAD[bad]
    good = {name: [torch.randn(3, 4), torch.randn(5)] for name in ("params", "backup", "a")}
    given = SimpleNamespace(**{**good, "group": [0, 1], "radius": [0.1] * 2, "eta": None, "fold": None, **change(good)})
    written = [*given.params, *given.backup]
    before = [tensor.detach().clone() for tensor in written]
    block = base.Block(given.params, given.group, given.backup, True)
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        place.backend.perturb(
            block, given.a, None, given.radius, place.sums(1.0), from_start=True, eta=given.eta, fold=given.fold
        )
    for old, new in zip(before, written, strict=True):
        assert torch.equal(old, new)


@on([name for name in KERNELS if name in ("native", "emulated")])
def test_bad_numbers_are_refused(place):
    params, a = ([torch.randn(3, 4), torch.randn(5)] for _ in range(2))
    block, backend = base.Block(params, [0, 1]), place.backend
    row, factors, products = (0.1, 0.9, 0.0, 0.0, 0.0, 0.0), [[1.0, 1.0]], place.sums([[1.0, 1.0, 1.0]] * 2)
    plain = base.Direction([a], factors)

    def along(*arguments):
        return lambda: backend.direction(block, base.Direction(*arguments), params)

    def update(state=None, groups=(row, row), options=((1.0,),), option=(0, 0)):
        return lambda: backend.update(block, plain, "sgd", state or [a], groups, options, option)

    for call, message in (
        (lambda: backend.square_norm(block, a, eta=[0.1]), "eta must have one entry per parameter group"),
        (lambda: backend.inner_products(block, plain, None, 1), "groups must be 2 (to 1048576|or more), got 1"),
        (along([a] * 4, factors * 4), "terms must be 1 to 3 lists of tensors, got 4"),
        (along([], []), "terms must be 1 to 3 lists of tensors, got 0"),
        (along([a], []), "p (and q must have 2 numbers|must have one list of numbers per term)"),
        (along([a], [[1.0]]), "p (and q must have 2 numbers|must have one entry per parameter group)"),
        (along([a], factors, factors), "products must be given"),
        (along([a], factors, factors, place.sums([[1.0] * 4]), [0.1]), "products must be .*(three|3) numbers"),
        (
            along([a], factors, factors, products, [0.1], 1.0),
            "gamma must have one number per row of products, .* 2, got 1",
        ),
        (update(state=[a] * 2), "state must (be|have)( at most)? 1 (lists|entries)"),
        (update(state=[a[:1]]), r"state\[0\] must have one tensor per parameter, that is 2, got 1"),
        (update(groups=[row]), "groups must have one entry per parameter group, that is 2, got 1"),
        (update(groups=[row, row[:5]]), r"groups(\[1\])? must have 6 (numbers|entries)"),
        (update(options=[()]), r"options(\[0\])? must have 1 (numbers|entries)"),
        (
            update(option=[0]),
            "option must have (one (index|entry) per parameter, that is 2, got 1|for each of the 2 parameters .*)",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()


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
    done = in_a_process(f"FILE = {str(file)!r}\n{BROKEN_CORE}")
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
    (said,) = in_a_process(program).splitlines()
    assert re.search(rf"torch 2.5.1, this is {re.escape(torch.__version__)}; pip install --no-build-iso", said)


def test_without_a_core_nothing_is_warned_of():
    """``GAM_FAST_BUILD=none``, or a processor or compiler for which there is none."""
    program = "import sys; sys.modules['gam_fast._C'] = None; import torch, gam_fast; "
    program += "print(gam_fast.GAM([torch.nn.Parameter(torch.ones(1))])._select(torch.device('cpu')).name)"
    assert in_a_process(program) == "eager\n"
