"""Lists of parameters and gradients between passes: both implementations do the same, and take nobody's memory."""

from __future__ import annotations

import numpy
import pytest
import torch
from cases import BACKENDS, INTERPRETED, in_turn
from torch import nn

import gam_fast
from gam_fast import backends, ownership
from gam_fast.backends import base

if INTERPRETED:
    pytest.skip("bookkeeping is the same for all kernels of Triton", allow_module_level=True)

CPU = torch.device("cpu")


@pytest.fixture(params=["plain", *(["native"] if "native" in BACKENDS else [])])
def books(request) -> base.Bookkeeping:
    """In Python, and in C++, where it is the same for a CPU and a GPU."""
    return ownership if request.param == "plain" else backends.select("native", CPU).bookkeeping


@pytest.fixture
def core():
    if "native" not in BACKENDS:
        pytest.fail("the compiled core is missing")
    return backends.select("native", CPU).core


ORDERS = [((0, 1, 2), (0, 1, 2)), ((2, 0, 1), (1, 2, 0)), ((1, 0, 2), (1, 0, 2))]
"""Permutations of dimensions: there and back."""


def parameters(count=4, size=8):
    params = [nn.Parameter(torch.full((size,), float(i + 1))) for i in range(count)]
    with torch.enable_grad():
        for param in params:
            (param**2).sum().backward()
    return params


@torch.no_grad()
def test_the_first_tensor_that_was_written_to_is_found(books):
    params = books.hold(parameters())
    before = books.versions(params)
    assert before.first_changed(params) == -1
    params[2].add_(1.0)
    params[3].add_(1.0)
    assert before.first_changed(params) == 2


def test_counters_of_steps_are_read_and_counted(books):
    steps = [torch.tensor(3.0), torch.tensor(2.0**24), torch.tensor(7.0, dtype=torch.float64), torch.tensor(5.0)]
    versions = [step._version for step in steps]
    expected = [4.0, 2.0**24, 8.0, 6.0]  # 2²⁴ + 1 is no number of fp32
    assert books.count_steps(steps, False) in (expected, [4.0, 2.0**24 + 1.0, 8.0, 6.0])
    assert [step.item() for step in steps] == [3.0, 2.0**24, 7.0, 5.0]
    books.count_steps(steps, True)
    assert [step.item() for step in steps] == expected
    assert [step._version for step in steps] == [version + 1 for version in versions]


def test_cleared_gradients_are_handed_out_where_they_can_be_a_backup(books):
    params = [*parameters(3), nn.Parameter(torch.ones(2, 4).T)]
    small = nn.Parameter(torch.ones(1))
    small.sum().backward()
    params[3].grad = torch.ones(4, 2)  # of another layout
    kept = params[1].grad
    addresses = [param.grad.data_ptr() for param in params]
    found = books.clear_gradients(books.hold([*params, small]), 32)
    assert [i for i, _ in found] == [0, 2]
    assert [grad.data_ptr() for _, grad in found] == [addresses[0], addresses[2]]
    assert kept.data_ptr() == addresses[1]
    assert all(param.grad is None for param in (*params, small))


@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_gradients_come_in_the_dtype_of_their_parameters_and_zero_where_there_is_none(books, keep):
    params = parameters(4)
    params[1].grad = None
    params[2].data = params[2].data.half()  # as a model that was converted between backward and step
    addresses = [None if param.grad is None else param.grad.data_ptr() for param in params]
    taken = books.take_gradients(books.hold(params), keep)
    assert [x.dtype for x in taken] == [param.dtype for param in params]
    expected = [2.0, 0.0, 6.0, 8.0]
    assert all(torch.equal(x, torch.full_like(x, value)) for x, value in zip(taken, expected, strict=True))
    assert [taken[i].data_ptr() for i in (0, 3)] == [addresses[0], addresses[3]]  # not copied
    assert all((param.grad is None) == (keep or i == 1) for i, param in enumerate(params))


HOLDS = {
    "tensor": lambda grad: grad,
    "view": lambda grad: grad.view(2, 4),
    "detached": lambda grad: grad.detach(),
    "storage": lambda grad: grad.untyped_storage(),
    "numpy": lambda grad: grad.numpy(),
}


@pytest.mark.parametrize("how", HOLDS)
@torch.no_grad()
def test_a_gradient_that_somebody_holds_is_copied(books, how):
    params = parameters(2)
    held = HOLDS[how](params[0].grad)
    addresses = [param.grad.data_ptr() for param in params]
    taken = books.take_gradients(books.hold(params), True)
    assert held is not None
    assert [x.data_ptr() == address for x, address in zip(taken, addresses, strict=True)] == [False, True]
    assert torch.equal(taken[0], torch.full((8,), 2.0))


@pytest.mark.parametrize("memory", ["numpy", "shared", "bucket"])
@torch.no_grad()
def test_memory_with_other_owners_is_copied(books, memory):
    param = nn.Parameter(torch.ones(8))
    made = {
        "numpy": lambda: torch.from_numpy(numpy.ones(8, dtype="float32")),
        "shared": lambda: torch.ones(8).share_memory_(),
        "bucket": lambda: torch.ones(20)[4:12],
    }
    param.grad = made[memory]()
    address = param.grad.data_ptr()
    assert books.take_gradients(books.hold([param]), True)[0].data_ptr() != address


UNUSUAL = {
    "no gradient": lambda param, flags: setattr(param, "grad", None),
    "written": lambda param, flags: param.detach().add_(0.0),
    "sparse": lambda param, flags: setattr(param, "grad", torch.ones(8).to_sparse()),
    "flags": lambda param, flags: flags.__setitem__(2, 1),
}


@pytest.mark.parametrize(("what", "keep"), in_turn(UNUSUAL, [True, False]))
@torch.no_grad()
def test_what_is_unusual_is_left_as_it_was(books, what, keep):
    params = parameters()
    held, flags = books.hold(params), bytearray(4)
    versions = books.versions(held)
    UNUSUAL[what](params[2], flags)
    grads = [param.grad for param in params]
    assert books.take_all_gradients(held, versions, flags, keep) is None
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))


@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_what_is_usual_is_taken_in_one_go(core, keep):
    params = parameters()
    held = core.hold(params)
    addresses = [param.grad.data_ptr() for param in params]
    taken = core.take_all_gradients(held, core.versions(held), bytearray(4), keep)
    assert [x.data_ptr() for x in taken] == addresses
    assert all((param.grad is None) == keep for param in params)


@torch.no_grad()
def test_the_core_knows_whose_the_memory_is(core):
    params = parameters()
    assert not core.hold(params).owned
    assert not core.take_gradients(core.hold(params), False).owned
    assert core.take_gradients(core.hold(params), True).owned
    assert core.empty_like(params).owned


@pytest.mark.parametrize("keep", [True, False])
@torch.no_grad()
def test_gradients_come_in_the_order_in_memory_of_their_parameters(books, keep):
    values = torch.arange(24.0).view(2, 3, 4)
    params = [nn.Parameter(values.clone().permute(order).contiguous().permute(back)) for order, back in ORDERS]
    params.append(nn.Parameter(torch.ones(4, 1, 1)))
    given = [values + 1, values + 2, values.clone().expand(2, 3, 4), torch.ones(1, 1, 4).permute(2, 0, 1)]
    for param, grad in zip(params, given, strict=True):
        param.grad = grad
    given = [grad.clone() for grad in given]
    addresses = [param.grad.data_ptr() for param in params]
    taken = books.take_gradients(books.hold(params), keep)
    for x, param, grad in zip(taken, params, given, strict=True):
        assert torch.equal(x, grad)
        assert all(a == b or n == 1 for n, a, b in zip(x.shape, x.stride(), param.stride(), strict=True))
    assert [x.data_ptr() == address for x, address in zip(taken, addresses, strict=True)][1:3] == [False, False]
    assert keep or [taken[i].data_ptr() for i in (0, 3)] == [addresses[0], addresses[3]]  # not copied


def test_small_tensors_are_allocated_together_and_large_ones_alone(core):
    like = [
        torch.ones(3),
        torch.ones(5, dtype=torch.float64),
        torch.ones(1 << 15),
        torch.ones(0, 2),
        torch.ones(2, 3).T,
    ]
    made = core.empty_like(core.hold(like))
    for x, y in zip(made, like, strict=True):
        assert (x.shape, x.dtype, x.stride(), x.requires_grad) == (y.shape, y.dtype, y.stride(), False)
        assert x.data_ptr() % 64 == 0
        x.fill_(7.0)
    assert all(bool((x == 7.0).all()) for x in made)  # nobody's memory is another's
    storages = [x.untyped_storage().data_ptr() for x in made]
    assert storages[0] == storages[1] == storages[4] != storages[2]
    assert made[0] is made[0]


def test_many_small_tensors_step_as_they_do_by_torch():
    """So many that lists are looked at once and memory is shared."""
    found = {}
    for backend in BACKENDS:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(1_500)]
        source = [torch.randn(5, dtype=torch.float64) for _ in params]
        optimizer = gam_fast.GAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)
        for _ in range(2):
            for _ in optimizer.passes():
                torch.autograd.backward([p * p * p for p in params], source)
        found[backend] = torch.cat([param.detach() for param in params])
    torch.testing.assert_close(found[BACKENDS[-1]], found["eager"], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("_on_each_backend")
@pytest.mark.parametrize("how", ["data", "storage"])
def test_memory_that_is_exchanged_within_a_step_is_followed(how):
    """By code that runs in a pass: addresses of an earlier pass would be those of freed memory."""
    weight = nn.Parameter(torch.linspace(1.0, 2.0, 3000, dtype=torch.float64))
    start = weight.detach().clone()
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.0)
    keep = []
    for turn in optimizer.passes():
        if turn.index == 1:
            if how == "data":
                weight.data = weight.data.clone()
            else:
                moved = weight.detach().clone()
                weight.untyped_storage().resize_(0)
                keep.append(torch.full((3000,), -1.0, dtype=torch.float64))  # may well get the memory that was freed
                weight.untyped_storage().resize_(moved.numel() * 8)
                weight.data.copy_(moved)
        (weight**2).sum().backward()
    assert torch.equal(weight, start)
    assert all(bool((other == -1.0).all()) for other in keep)
