"""The Triton kernels and their launches, in Triton's interpreter: a process of its own, started by `make interpret`."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, METHODS, WITHOUT_CORE
from primitives import AdamGroup, SGDGroup, adam, run_all, same_bits, sgd, tensors
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import gam_fast
from gam_fast import backends
from gam_fast.backends import base, eager, triton
from gam_fast.backends import launches as started

CPU = torch.device("cpu")
LENGTHS = (1, 7, 1023, 1024, 1025, 8191, 8192, 8193, 17_411)


def core():
    """What gives the bits: the compiled core; where it is left out on purpose, plain torch is near them."""
    return backends.select("eager" if WITHOUT_CORE else "native", CPU)


def assert_same(found, expected, name):
    if not WITHOUT_CORE:
        assert same_bits(found, expected), name
        return
    for x, y in zip(found, expected, strict=True):
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        rtol = max(64 * eps, 2 * torch.finfo(x.dtype).eps)
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.abs().max()) if y.numel() else 0.0, msg=name)


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


# The bits


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_primitive_has_the_bits_of_the_compiled_core_but_for_sums(dtype):
    shapes = [(n,) for n in LENGTHS] + [(), (0,), (5, 7)]
    actual = run_all(triton.TritonBackend(), dtype, shapes)
    expected = run_all(core(), dtype, shapes)
    assert actual.keys() == expected.keys()
    for name, found in actual.items():
        if name in ("norm", "norm of difference", "products"):
            rtol = 1e-13 if dtype == torch.float64 else 2e-6  # the CPU core adds up more of them in fp32
            atol = rtol * float(expected[name][0].abs().max())  # products may cancel
            torch.testing.assert_close(found[0], expected[name][0], rtol=rtol, atol=atol, msg=name)
        else:
            assert_same(found, expected[name], name)


def shifted(values):
    """The same elements where no array is aligned to more than its items."""
    result = []
    for value in values:
        room = torch.empty(value.numel() + 1, dtype=value.dtype)
        result.append(room[1:].view(value.shape).copy_(value))
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_arrays_lie_changes_no_bit_not_even_of_a_sum(dtype):
    shapes = [(n,) for n in LENGTHS]
    group = [0] * len(shapes)
    found = []
    for put in (list, shifted):
        a, b, params, buffers = (put(tensors(dtype, seed, shapes)) for seed in (1, 2, 3, 4))
        backend = triton.TritonBackend()
        leaves = base.Block(params, group, backend.allocate(params))
        square = backend.square_norm(leaves, a, b)
        backend.perturb(leaves, a, b, [0.3], square, from_start=False)
        moved = [p.clone() for p in params]
        d = base.Direction([a, b], [[1.0], [-0.5]])
        products = backend.inner_products(leaves, d, None, 1)
        sgd(backend, leaves, d, buffers, [False] * len(shapes), [SGDGroup(0.1, 0.9, 0.0, 1e-2, False, False)])
        found.append([square, products, *moved, *params, *buffers])
    assert same_bits(*found)


def test_dense_arrays_are_walked_in_the_order_of_memory():
    """Elementwise with the parameter, whatever its order."""
    generator = torch.Generator().manual_seed(1)
    params = [
        torch.randn(3, 4, 5, 6, generator=generator).contiguous(memory_format=torch.channels_last),
        torch.randn(40, 30, generator=generator).T,
    ]
    grads = [torch.randn_like(p) for p in params]
    expected = [p - 0.5 * g for p, g in zip(params, grads, strict=True)]
    leaves = base.Block(params, [0, 0], [torch.empty_like(p) for p in params])
    triton.TritonBackend().perturb(leaves, grads, None, [-0.5], 1.0, from_start=False)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e)


def test_state_of_another_dtype_or_order_is_not_taken():
    params, backend = tensors(torch.float32, 1, [(9, 3), (1, 5)]), triton.TritonBackend()
    leaves = base.Block(params, [0, 0])
    good = [torch.zeros(9, 3), torch.zeros(5, 1).T]
    assert backend.takes_state(leaves, [good, [None, None]])
    for wrong in (good[0].double(), torch.zeros(3, 9).T):
        assert not backend.takes_state(leaves, [good, [wrong, None]])
        with pytest.raises(ValueError, match=r"state\[0\]\[0\] must be a plain tensor .* as its parameter"):
            sgd(backend, leaves, base.Direction([good], [[1.0]]), [wrong, None], [False] * 2, [SGDGroup(*[0.1] * 6)])


def test_state_that_a_leaf_does_not_have_is_zero(launches):
    """Beside leaves that have it; a list that none has costs nothing."""
    shapes = [(1500,), (9,), (1025,)]
    params, grads = tensors(torch.float32, 1, shapes), tensors(torch.float32, 2, shapes)
    found = []
    for absent in (None, 0.0):
        values = [p.clone() for p in params]
        buffers = tensors(torch.float32, 3, shapes)
        buffers[0] = None if absent is None else torch.zeros(1500)
        leaves = base.Block(values, [0, 1, 1])
        rows = [SGDGroup(0.1, 0.0, 0.0, 0.01, False, False), SGDGroup(0.1, 0.9, 0.2, 0.0, True, False)]
        sgd(triton.TritonBackend(), leaves, base.Direction([grads], [[1.0, 1.0]]), buffers, [True, False, False], rows)
        found.append([*values, *buffers[1:]])
    assert same_bits(*found)
    assert launches == ["update", "update"]


# Groups


def test_what_a_group_does_not_use_is_not_read():
    """Group 0 uses the first two terms, group 1 the last, group 2 none: it gets 0 times the first."""
    shapes = [(1500,), (1500,), (1500,)]
    terms = [tensors(torch.float32, seed, shapes) for seed in (1, 2, 3)]
    p = [[2.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 3.0, 0.0]]
    for t, g in ((2, 0), (0, 1), (1, 1), (1, 2), (2, 2)):
        terms[t][g].fill_(float("nan"))
    d = base.Direction(terms, p)
    expected = [2.0 * terms[0][0] - terms[1][0], 3.0 * terms[2][1], torch.zeros(1500)]
    backend = triton.TritonBackend()
    params = tensors(torch.float32, 4, shapes)
    leaves = base.Block(params, [0, 1, 2], [q.clone() for q in params], True)
    products = backend.inner_products(leaves, d, None, 5)
    torch.testing.assert_close(
        products[:, 0],
        torch.stack(
            [*(e.double().square().sum() for e in expected), torch.tensor(0.0).double(), torch.tensor(0.0).double()]
        ),
    )
    out = backend.allocate(params)
    backend.direction(leaves, d, out)
    for found, e in zip(out, expected, strict=True):
        torch.testing.assert_close(found, e)


def test_forty_groups_some_of_them_without_leaves():
    """More than the 16 for which a vector of a kernel has room by default; κ and the clipping factor run over all."""
    groups = [g for g in range(40) if g % 3]
    shapes = [(30 + g,) for g in groups]
    terms = [tensors(torch.float64, seed, shapes) for seed in (1, 2)]
    c, m = [[1.0 + g for g in range(40)], [0.5] * 40], [[-1.0] * 40, [0.1 * g for g in range(40)]]
    gamma = [0.01 * g for g in range(40)]
    params = tensors(torch.float64, 3, shapes)
    found = []
    for backend in (triton.TritonBackend(), eager.EagerBackend()):
        leaves = base.Block(params, groups, [p.clone() for p in params], True)
        u = base.Direction(terms, c)
        products = backend.inner_products(leaves, u, base.Direction(terms, m), 40)
        q = [[g * x for g, x in zip(gamma, row, strict=True)] for row in c]
        d = base.Direction(terms, c, q, products, gamma, limit=2.0)
        out = backend.allocate(params)
        backend.direction(leaves, d, out)
        found.append([products, *out])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_numbers_that_are_not_finite_go_their_way():
    """As in the compiled core, and in Adam as in torch: the core makes NaN of an average of infinities."""
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([1.0, -0.0, inf, -inf, nan, 1e-40, 3e38])
    grads = torch.tensor([inf, 1.0, 1.0, nan, 1.0, 1e-40, 3e38])
    found = []
    ours = triton.TritonBackend()
    for of_sgd, of_adam in ((ours, ours), (core(), eager.EagerBackend())):
        params, moved, buffer, m, v, top = (values.clone() for _ in range(6))
        d = base.Direction([[grads]], [[1.0]])
        rows = [SGDGroup(0.1, 0.9, 0.0, 0.0, True, False)]
        sgd(of_sgd, base.Block([params], [0], [values.clone()], True), d, [buffer], [False], rows)
        rows = [AdamGroup(0.1, 0.9, 0.99, 1e-3, 0.0, False, True, False)]
        adam(of_adam, base.Block([moved], [0], [values.clone()], True), d, [m], [v.abs_()], [top.abs_()], [3.0], rows)
        found.append([params, buffer, moved, m, v, top])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-45, equal_nan=True)


def test_a_norm_of_millions_is_within_its_bound():
    values = torch.rand(1_000_003, generator=torch.Generator().manual_seed(1)) + 0.1
    leaves = base.Block([values], [0])
    exact = values.double().square().sum()
    assert abs(triton.TritonBackend().square_norm(leaves, [values]) - exact) <= 9 * 2**-24 * exact


# Launches


def test_a_thousand_tensors_take_one_launch_a_primitive(launches):
    generator = torch.Generator().manual_seed(3)
    shapes = [(int(n),) for n in torch.randint(0, 12, (1000,), generator=generator)]
    params, grads = tensors(torch.float32, 1, shapes), tensors(torch.float32, 2, shapes)
    expected = [p - 0.1 * g for p, g in zip(params, grads, strict=True)]
    leaves = base.Block(params, [i % 2 for i in range(1000)], [p.clone() for p in params], True)
    backend = triton.TritonBackend()
    norm = backend.square_norm(leaves, grads)
    torch.testing.assert_close(norm, torch.cat(grads).double().square().sum(), rtol=1e-6, atol=0.0)
    rows = [SGDGroup(0.1, 0.0, 0.0, 0.0, False, False)] * 2
    sgd(backend, leaves, base.Direction([grads], [[1.0, 1.0]]), [None] * 1000, [False] * 1000, rows)
    assert launches == ["sums", "totals", "update"]
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e)


@pytest.mark.usefixtures("_on_each_backend", "as_on_a_gpu")
@pytest.mark.parametrize("build", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("method_name", METHODS)
def test_a_step_is_as_many_launches_as_that_of_the_compiled_core(method_name, build, launches):
    method = METHODS[method_name]
    params = [nn.Parameter(t) for t in tensors(torch.float32, 1, [(9,), (3, 4)])]
    optimizer = method.optimizer(params, build, lr=0.1, on_nonfinite="ignore", **method.hyper)
    optimizer.step(lambda: sum(p.square().sum() for p in params).backward())
    moves = method.passes - 1
    projects = bool(method.optimizer.recipe.m)
    assert len(launches) == 3 * moves + 2 * projects + 1
    assert launches[-1] == "update"


@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_is_written_is_known_to_autograd():
    params, grads = tensors(torch.float32, 1), tensors(torch.float32, 2)
    backend = triton.TritonBackend()
    leaves = base.Block(params, [0] * len(params), backend.allocate(params))
    versions = [p._version for p in params]
    backend.perturb(leaves, grads, None, [0.1], 1.0, from_start=False)
    backend.restore(leaves)
    assert [p._version for p in params] == [version + 2 for version in versions]
    assert [g._version for g in grads] == [0] * len(grads)


# Interruptions of the launch that saves and moves


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("after", [False, True])
def test_an_interrupt_around_the_first_move_is_undone(monkeypatch, after):
    params, grads = tensors(torch.float32, 1), tensors(torch.float32, 2)
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
    params, grads = tensors(torch.float32, 1), tensors(torch.float32, 2)
    before = [p.clone() for p in params]
    backend = triton.TritonBackend()
    leaves = base.Block(params, [0] * len(params), backend.allocate(params))
    backend.perturb(leaves, grads, None, [0.1], 1.0, from_start=False)
    launches.clear()
    backend.restore(leaves)
    assert launches == []
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


# Bad input: nothing is changed


def primitives_of(backend, params, grads, **options):
    leaves = base.Block(params, [0] * len(params), [p.clone() for p in params], True)
    backend.perturb(leaves, grads, None, [0.1], 1.0, from_start=True, **options)


OTHER = r"a\[1\] must be a plain tensor with its elements in memory as its parameter"


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda p, g: (p, g[:1]), ValueError, "a must have one tensor a parameter, that is 2, got 1"),
        (lambda p, g: (p, [g[0], g[1][:3]]), ValueError, OTHER),
        (lambda p, g: (p, [g[0], g[1].double()]), ValueError, OTHER),
        (lambda p, g: (p, [g[0], g[1].to("meta")]), ValueError, OTHER),
        (lambda p, g: (p, [g[0], torch._neg_view(g[1])]), ValueError, OTHER),
        (lambda p, g: (p, [g[0], TwoTensor(g[1], g[1])]), ValueError, OTHER),
        (lambda p, g: (p, [g[0], torch.zeros(10)[::2]]), ValueError, OTHER),
        (lambda p, g: ([p[0], p[1].double()], g), TypeError, "parameters must be of one dtype"),
        (lambda p, g: ([p[0][:1].expand(5), p[1]], g), ValueError, r"params\[0\] must be dense"),
        (lambda p, g: ([q.int() for q in p], [h.int() for h in g]), TypeError, "dtype of float64, float32, bfloat16"),
    ],
)
def test_bad_lists_are_refused(spoil, error, match, launches):
    params, grads = tensors(torch.float32, 1, [(5,), (5,)]), tensors(torch.float32, 2, [(5,), (5,)])
    bad_params, bad_grads = spoil(params, grads)
    with pytest.raises(error, match=match):
        primitives_of(triton.TritonBackend(), bad_params, bad_grads)
    assert launches == []


def test_a_lazy_view_at_a_known_address_is_refused():
    params, grads = tensors(torch.float32, 1, [(5,)]), tensors(torch.float32, 2, [(5,)])
    backend = triton.TritonBackend()
    primitives_of(backend, params, grads)
    with pytest.raises(ValueError, match=r"a\[0\] must be a plain tensor"):
        primitives_of(backend, params, [torch._neg_view(grads[0])])


# Selection


def test_the_interpreter_takes_cpu_tensors_only_and_only_when_it_is_named():
    assert backends.select("triton", CPU).name == "triton"
    assert backends.select("auto", CPU).name != "triton"
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 runs the Triton kernels on CPU tensors only"):
        backends.select("triton", torch.device("cuda"))
    assert "in its interpreter on CPU tensors" in backends.available()["triton"].reason


def test_gam_trains_by_name():
    weight = nn.Parameter(torch.ones(3))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1, backend="triton")
    optimizer.step(lambda: weight.square().sum().backward())
    assert weight.max() < 1.0
