"""The CUDA core under the emulator: its bits against the CPU core, launches, tables, streams, graphs, planted bugs."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import emulated
import pytest
import torch
from cases import CAN_EMULATE, DTYPES, METHODS, closure_of, make, pairwise
from primitives import AdamGroup, SGDGroup, adam, run_all, same_bits, sgd, tensors
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

import gam_fast
from gam_fast import backends
from gam_fast.backends import base

if not CAN_EMULATE:
    pytest.skip("the emulator needs a compiler, and x86-64 Linux", allow_module_level=True)

CPU = torch.device("cpu")
SHAPES = ((20_001,), (33,), (), (0,), (5, 7), (8192,), (8193,), (3,), *[(1 + i % 5,) for i in range(40)])
SUMS = ("norm", "norm of difference", "products")


@pytest.fixture
def core():
    yield emulated.core()
    emulated.core().set_order("fwd")
    emulated.core().use_stream(0)
    emulated.core().capture(0)


@dataclass(frozen=True)
class Place:
    """Where the kernels run: by the emulator on CPU tensors, or on a GPU."""

    device: str

    def backend(self):
        return emulated.backend() if self.device == "cpu" else backends.select("native", torch.device("cuda"))

    def tensors(self, dtype, seed, shapes):
        return [tensor.to(self.device) for tensor in tensors(dtype, seed, shapes)]


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a real GPU")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def place(request):
    return Place("cpu" if request.param == "emulated" else "cuda")


def cpu_core():
    """The loops with FMA, as kernels have it."""
    from gam_fast import _C

    if _C.instruction_set() == "baseline":
        pytest.fail("the processor has no fused multiply-add: its bits are others")
    return backends.select("native", CPU)


# Values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_those_of_the_cpu_core(place, dtype):
    """All but sums, whose order is another."""
    ours, theirs = run_all(place.backend(), dtype, SHAPES, place.device), run_all(cpu_core(), dtype, SHAPES)
    bound = 1e-12 if dtype == torch.float64 else 6e-7  # of sums.cu, and twice that for what is subtracted first
    for name, expected in theirs.items():
        if name in SUMS:
            size = max(float(value.abs().max()) for value in expected)
            found = [value.cpu() for value in ours[name]]
            torch.testing.assert_close(found, expected, rtol=2 * bound, atol=2 * bound * size)
        else:
            assert same_bits(ours[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_order_of_threads_and_blocks_changes_a_bit(core, dtype):
    results = {}
    for order in ("fwd", "rev", "rand:1", "rand:7"):
        core.set_order(order)
        results[order] = run_all(emulated.backend(), dtype, SHAPES[:12])
    for order, result in results.items():
        for name, values in result.items():
            assert same_bits(values, results["fwd"][name]), f"{order}: {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("difference", "eta", "folds", "start"),
    pairwise([False, True], [None, [0.0, 0.1]], [False, True], ["unsaved", "unsaved, from θ", "here", "from θ"]),
    ids=str,
)
def test_variants_of_a_move_have_the_bits_of_the_cpu_core(place, dtype, difference, eta, folds, start):
    results = []
    for where, backend in ((Place("cpu"), cpu_core()), (place, place.backend())):
        made = [where.tensors(dtype, seed, ((1030,), (33,), (), (0,), (5, 7), (3,))) for seed in range(6)]
        leaves = base.Block(made[0], [0, 1] * 3, made[1], not start.startswith("unsaved"))
        fold = base.FoldInto(made[4], made[5], [0.5, 1.5], [-0.25, 0.1]) if folds else None
        minus = made[3] if difference else None
        backend.perturb(leaves, made[2], minus, [0.1, -0.2], 2.0, from_start=start.endswith("θ"), eta=eta, fold=fold)
        assert leaves.saved
        results.append([t.cpu() for values in made for t in values])
    assert same_bits(*results)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 255, 256, 1023, 1024, 1025, 8191, 8192, 8193, 16_385])
def test_lengths_around_packs_blocks_and_chunks(place, count):
    """Each element once, none beside it."""
    values = torch.arange(1, count + 1, dtype=torch.float32, device=place.device)
    room = torch.full((count + 8,), 7.0, device=place.device)
    target = base.Block([room[4 : 4 + count]], [0], [torch.empty_like(values)])
    target.params[0].copy_(values)
    backend = place.backend()
    assert float(backend.square_norm(target, target.params)) == pytest.approx(
        float((values.double() ** 2).sum()), rel=6e-7
    )
    backend.perturb(target, [values], None, [1.0], 0.25, from_start=False)
    assert torch.equal(target.params[0], torch.add(values, values, alpha=2.0 - 4e-12))
    assert torch.equal(target.backup[0], values)
    assert bool((room[:4] == 7.0).all())
    assert bool((room[4 + count :] == 7.0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "unaligned"])
def test_alignment_and_layout_change_no_bit(place, dtype, layout):
    """Nor those of sums: which thread adds which elements depends on their place in memory only."""
    shape = (5, 70, 6, 4)

    def lay_out(values, index):
        if layout == "channels_last":
            return values.contiguous(memory_format=torch.channels_last)
        flat = torch.full((values.numel() + 1 + index,), 9.0, dtype=dtype, device=place.device)
        view = flat[1 + index :].view(shape)
        view.copy_(values)
        return view

    results = []
    for arrange in (False, True):
        made = [place.tensors(dtype, seed, (shape,))[0] for seed in range(6)]
        params, backup, a, b, into, momentum = ([lay_out(t, i) if arrange else t] for i, t in enumerate(made))
        backend = place.backend()
        leaves = base.Block(params, [0], backup, True)
        norm = backend.square_norm(leaves, a, b, [0.1])
        u = base.Direction([a, into], [[0.5], [1.0]])
        products = backend.inner_products(leaves, u, base.Direction(u.terms, [[1.0], [0.0]]), 1)
        fold = base.FoldInto(into, b, [0.5], [2.0])
        backend.perturb(leaves, a, b, [0.1], 4.0, from_start=True, fold=fold)
        moved = params[0].clone()
        sgd(backend, leaves, u, momentum, [False], [SGDGroup(0.1, 0.9, 0.0, 0.01, False, False)])
        out = [torch.zeros(shape, dtype=dtype, device=place.device)]
        out = [lay_out(out[0], 6)] if arrange else out
        backend.direction(leaves, u, out)
        results.append((norm, products, moved, params[0], into[0], momentum[0], out[0]))
        for tensor in (params[0], out[0]) if arrange and layout == "unaligned" else ():
            assert bool((tensor._base[: tensor.storage_offset()] == 9.0).all()), "written beside the tensor"
    first = 0 if layout != "channels_last" else 2  # in memory order, which is another
    assert same_bits(results[0][first:], results[1][first:])


@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_numbers_of_many_groups(place, count):
    """Up to 16 travel in the arguments of a kernel, more in the table."""
    results = []
    for where, backend in ((Place("cpu"), cpu_core()), (place, place.backend())):
        made = [where.tensors(torch.float32, seed, ((5,),) * count) for seed in range(6)]
        leaves = base.Block(made[0], list(range(count)), made[1], True)
        u = base.Direction([made[2], made[3]], [[0.1 * g for g in range(count)], [1.0] * count])
        products = backend.inner_products(leaves, u, base.Direction(u.terms, [[1.0] * count, [-0.5] * count]), count)
        norm = backend.square_norm(leaves, made[2], None, [0.01 * g for g in range(count)])
        fold = base.FoldInto(made[5], made[3], [0.01 * g for g in range(count)], [1.0] * count)
        radius = [0.1 + g for g in range(count)]
        backend.perturb(leaves, made[2], made[3], radius, 2.0, from_start=True, fold=fold)
        moved = [t.clone() for t in made[0]]
        rows = [AdamGroup(0.1 + g, 0.9, 0.99, 1e-3, 0.01, True, False, g % 2 == 0) for g in range(count)]
        fixed = [[2.0 + 0.01 * g, 1.0, 3.0] for g in range(count)]
        d = base.Direction(u.terms, u.p, [[0.1] * count, [0.2] * count], fixed, [0.01 * g for g in range(count)], 2.0)
        squares = [t.abs() for t in made[5]]
        adam(backend, leaves, d, made[4], squares, [None] * count, [1.0 + g for g in range(count)], rows)
        results.append((norm, products, moved, leaves.params, made[4], squares))
    (norm, products, *theirs), (our_norm, our_products, *ours) = results
    torch.testing.assert_close(our_norm.cpu(), norm, rtol=6e-7, atol=0.0)
    torch.testing.assert_close(our_products.cpu(), products, rtol=6e-7, atol=6e-7 * float(products.abs().max()))
    for x, y in zip(ours, theirs, strict=True):
        # κ and s add the groups up in another order from three groups on
        x = [t.cpu() for t in x]
        torch.testing.assert_close(x, y, rtol=0.0 if count == 1 else 1e-5, atol=0.0 if count == 1 else 1e-4)


def test_sums_of_millions_are_as_exact_as_they_say(place):
    """The bound of sums.cu, at a size where fp32 sums of whole tensors are off by far more."""
    values = torch.rand(3_000_000, device=place.device) + 0.5
    target = base.Block([values], [0])
    total = place.backend().square_norm(target, [values])
    exact = values.double().square().sum()
    assert abs(float(total / exact) - 1.0) < 9 * 2.0**-24


# Launches and tables


class Dispatched(TorchDispatchMode):
    """The operations of torch that would be kernels on a GPU."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not re.match(r"(aten\.(empty|view|detach|alias)|profiler)", str(function)):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method_name", "base_name", "policy", "clip"),
    pairwise(METHODS, ["SGD", "AdamW"], ["raise", "ignore"], [None, 1.0]),
)
def test_a_step_is_as_many_launches_as_its_table_says(core, monkeypatch, method_name, base_name, policy, clip):
    """A norm is 2 launches, a move 1, the products 2, the update 1; GAM makes 12. And no kernel of torch's."""
    emulated.use(monkeypatch)
    method = METHODS[method_name]
    options = {"momentum": 0.9} if base_name == "SGD" else {}
    params = [torch.nn.Parameter(torch.randn(7)) for _ in range(5)]
    optimizer = method.optimizer(
        params,
        getattr(torch.optim, base_name),
        lr=0.1,
        on_nonfinite=policy,
        clip_grad_norm=clip,
        **options,
        **method.hyper,
    )
    gradients = [torch.randn(7) for _ in range(3 * method.passes * len(params))]
    for _ in range(3):
        dispatched = Dispatched()
        before, uploads = core.launches(), core.uploads()
        with dispatched:
            for _ in optimizer.passes():
                for param in params:
                    param.grad = gradients.pop()  # the optimizer may take its memory
        launches = core.launches() - before
    moves = method.passes - 1
    products = bool(optimizer.recipe.m) or policy == "raise" or clip is not None
    assert launches == 3 * moves + 2 * products + 1
    if method_name == "gam":
        assert launches <= 12
    on_host = {"aten.stack.default", "aten.add.Tensor", "aten._foreach_add_.Scalar"}  # Adam's counters of steps
    assert set(dispatched.names) <= (on_host if base_name == "AdamW" else set())
    assert core.uploads() - uploads <= 4 * method.passes


def test_a_thousand_tensors_are_one_launch_and_one_upload(core):
    backend = emulated.backend()
    made = [tensors(torch.float32, seed, ((64,),) * 1000) for seed in range(5)]
    leaves = base.Block(made[0], [0] * 1000, made[1], False)
    d = base.Direction([made[2], made[3]], [[0.5], [0.5]])
    group = SGDGroup(0.1, 0.9, 0.0, 0.0, False, False)

    def step():
        backend.perturb(leaves, made[2], None, [0.1], 4.0, from_start=False)
        sgd(backend, leaves, d, made[4], [False] * 1000, [group])
        backend.restore(leaves)
        leaves.saved = False

    counts = []
    for _ in range(3):
        before = core.launches(), core.uploads()
        step()
        counts.append((core.launches() - before[0], core.uploads() - before[1]))
    assert counts == [(3, 4), (3, 0), (3, 0)]  # the plan's own table the first time, and one for each call


def test_tables_follow_addresses_numbers_and_streams(core):
    backend = emulated.backend()
    params, a = [torch.randn(100)], [torch.randn(100)]
    leaves = base.Block(params, [0], [torch.empty(100)])

    def uploads(gradient, radius=0.1):
        before = core.uploads()
        leaves.saved = False
        backend.perturb(leaves, gradient, None, [radius], 4.0, from_start=False)
        return core.uploads() - before

    assert uploads(a) == 2
    assert uploads(a) == 0
    assert uploads(a, 0.2) == 0  # numbers of few groups are no part of it
    other = [torch.randn(100)]
    assert uploads(other) == 1
    assert [uploads(a), uploads(other)] == [0, 0]  # both are kept
    core.use_stream(5)  # what one stream copied, another has not waited for
    assert [uploads(a), uploads(a)] == [2, 0]
    core.use_stream(0)
    assert uploads(a) == 0
    for _ in range(40):  # the oldest make room
        other.append(torch.randn(100))
        assert uploads(other[-1:]) == 1
    assert uploads(a) == 1


def test_a_captured_step_has_tables_of_its_own(core):
    """A graph repeats its copies from memory that is kept; nothing of the cache may be in it, or from it."""
    backend = emulated.backend()
    made = [tensors(torch.float32, seed, SHAPES[:5]) for seed in range(4)]
    leaves = base.Block(made[0], [0] * 5, made[1])

    def uploads():
        before = core.uploads()
        leaves.saved = False
        backend.perturb(leaves, made[2], None, [0.1], 4.0, from_start=False)
        return core.uploads() - before

    assert [uploads(), uploads()] == [2, 0]
    core.capture(8)
    assert [uploads(), uploads()] == [2, 1]  # the pieces once in a graph
    core.capture(9)
    assert [uploads(), uploads()] == [2, 1]
    core.capture(0)
    assert uploads() == 0


def test_parameters_that_take_part_by_turns_keep_their_tables(core):
    """As with experts, or layers that are dropped at random."""
    backend = emulated.backend()
    made = [tensors(torch.float32, seed, SHAPES[:4]) for seed in range(3)]
    counts = []
    for step in range(8):
        chosen = [0, 1] if step % 2 else [2, 3]
        params, backup, a = ([values[i] for i in chosen] for values in made)
        before = core.uploads()
        backend.perturb(base.Block(params, [0, 0], backup), a, None, [0.1], 4.0, from_start=False)
        counts.append(core.uploads() - before)
    assert counts == [2, 2, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("base_name", ["SGD", "AdamW"])
def test_numbers_of_many_groups_are_copied_only_when_they_change(core, base_name):
    backend = emulated.backend()
    count = 20
    made = [tensors(torch.float32, seed, ((5,),) * count) for seed in range(5)]
    leaves, d = base.Block(made[0], list(range(count)), made[1], True), base.Direction([made[2]], [[1.0] * count])

    def step():
        before = core.uploads()
        if base_name == "SGD":
            rows = [SGDGroup(0.1, 0.9, 0.0, 0.01, True, False) for _ in range(count)]
            sgd(backend, leaves, d, made[3], [False] * count, rows)
        else:
            rows = [AdamGroup(0.1, 0.9, 0.99, 1e-3, 0.01, True, False, False) for _ in range(count)]
            adam(backend, leaves, d, made[3], made[4], [None] * count, [2.0] * count, rows)
        return core.uploads() - before

    assert [step(), step(), step()] == [2, 0, 0]


def test_products_may_have_rows_of_groups_on_other_devices(core):
    """Their γ counts for the norm of the direction, though none of their parameters is here."""
    results = []
    for backend in (cpu_core(), emulated.backend()):
        made = [tensors(torch.float32, seed, ((9,),)) for seed in range(4)]
        products = [[6.0, 5.0, 7.0], [4.0, 2.0, 3.0], [1.0, 0.5, 2.0]]
        terms = [made[2], made[3]]
        d = base.Direction(terms, [[0.5] * 3, [0.25] * 3], [[0.1] * 3] * 2, products, [0.1, 0.4, 0.2], 0.9)
        leaves = base.Block(made[0], [0], made[1], True)
        backend.direction(leaves, d, made[2])
        results.append((made[2], leaves.params))
        assert float(backend.inner_products(leaves, base.Direction(terms, d.p), None, 3)[1:].abs().sum()) == 0.0
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0.0)


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


def test_what_is_no_sum_is_refused(core):
    backend = emulated.backend()
    leaves = base.Block([torch.randn(3)], [0], [torch.randn(3)], True)
    plan, values = backend._plan_for(leaves), [torch.randn(3)]
    double = torch.float64
    for square in (
        torch.ones(2, dtype=torch.float64),
        torch.ones(()),
        torch.ones((), dtype=torch.float64, device="meta"),
    ):
        with pytest.raises(ValueError, match="square must be a contiguous float64 tensor on cpu of one number"):
            core.perturb(plan, leaves, values, None, [1.0], square, True, None, None)
    for products in (torch.ones(4, dtype=double), torch.ones(1, 3), torch.ones(3, 2, dtype=double).T[:1]):
        d = base.Direction([values], [[1.0]], [[1.0]], products, [0.1])
        with pytest.raises(ValueError, match="products must be .* three numbers a parameter group"):
            core.direction(plan, leaves, d, [torch.empty(3)])
    d = base.Direction([values], [[1.0]], None, torch.ones(2, 3, dtype=torch.float64), [0.1], 1.0)
    with pytest.raises(ValueError, match="gamma must have one number a row of products, that is 2, got 1"):
        core.direction(plan, leaves, d, [torch.empty(3)])


@pytest.mark.parametrize("base_name", ["SGD", "AdamW"])
def test_training_gives_the_parameters_of_the_cpu_core(core, monkeypatch, base_name):
    """Fifty steps of GAM on a small network in fp32: the sums differ in their last bits, nothing else does."""
    results = []
    for use_emulator in (False, True):
        model, batches = make("mlp", torch.float32)
        if use_emulator:
            emulated.use(monkeypatch)
        optimizer = gam_fast.GAM(model.parameters(), getattr(torch.optim, base_name), lr=1e-2, model=model)
        for step in range(50):
            optimizer.step(closure_of(model, *batches[step % len(batches)]))
        results.append([p.detach().clone() for p in model.parameters()])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


# The emulator itself

BARRIER, TAIL = "  __syncthreads();\n", "p * V + k < piece.length; ++k"
PLANTED = {
    "none": ("", "", "", ""),
    "a removed barrier": ("reduce.cuh", BARRIER, "", "norm"),
    "a tail that is one short": ("arrays.cuh", TAIL, "p * V + k < piece.length - 1; ++k", "norm"),
    "a tail that is one long": ("arrays.cuh", TAIL, "p * V + k <= piece.length; ++k", "moved"),
    "a mask without a lane": ("reduce.cuh", "0xffffffffu", "0x7fffffffu", "not in the mask"),
    "a barrier that some reach": ("reduce.cuh", BARRIER, "  if (warp) __syncthreads();\n", "barrier"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_found(tmp_path, bug):
    """A test of the tests: copies of the kernels, each with one mistake, in a small program of their own."""
    name, old, new, found = PLANTED[bug]
    source = emulated.ROOT / "csrc"
    for path in [*source.glob("*.h"), *source.glob("cuda/*.cuh"), *source.glob("cuda/*.h"), *source.glob("cuda/*.cu")]:
        target = tmp_path / "csrc" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8")
        if path.name == name:
            assert old in text, "the place of the mistake has moved"
            text = text.replace(old, new)
        target.write_text(text, encoding="utf-8")
    program = tmp_path / "planted"
    include = [f"-I{path}" for path in (tmp_path / "csrc", emulated.EMULATOR, *cpp_extension.include_paths())]
    flags = ["-std=c++17", "-O1", "-mfma", "-ffp-contract=off"]
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *flags, *include, str(Path(__file__).parent / "native" / "planted.cpp"), "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    output = ""
    for order in ("fwd", "rand:1", "rand:2"):
        done = subprocess.run([str(program), order], capture_output=True, text=True, timeout=120)
        output += done.stdout + done.stderr
    if found:
        assert re.search(f"wrong: .*({found})", output), output
    else:
        assert output == "", output
