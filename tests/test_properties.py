"""Properties over shapes, layouts, group splits and missing gradients, drawn by hypothesis."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import DTYPES, METHODS
from torch import nn

import gam_fast
from gam_fast.backends import base, eager
from gam_fast.ownership import take

pytestmark = pytest.mark.usefixtures("_on_each_backend")

SETTINGS = hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    # the backend is the same for all examples of a test
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)

shapes = st.lists(st.integers(0, 4), min_size=0, max_size=4).map(tuple)
layouts = st.sampled_from(["contiguous", "channels_last", "transposed", "strided"])


def lay_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another layout, where the shape has one."""
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and values.dim() >= 2:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided" and values.dim() >= 1:
        wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    return values.clone()


@st.composite
def models(draw):
    """Parameters as (shape, layout, group, in which passes a gradient is there), at least one gradient a pass."""
    count = draw(st.integers(1, 5))
    leaves = [
        (draw(shapes), draw(layouts), draw(st.integers(0, 2)), draw(st.lists(st.booleans(), min_size=4, max_size=4)))
        for _ in range(count)
    ]
    return [*leaves, ((3,), "contiguous", 0, [True] * 4)]


def run(leaves, method, dtype, *, plain_layout=False, one_group=False, flat=False):
    """Two steps along made-up smooth gradients; the parameters as they end."""
    generator = torch.Generator().manual_seed(2)
    params = []
    for shape, layout, _, _ in leaves:
        values = torch.randn(shape, generator=generator).to(dtype)
        params.append(nn.Parameter(values if plain_layout else lay_out(values, layout)))
    groups = [
        {"params": [p for p, leaf in zip(params, leaves, strict=True) if one_group or leaf[2] == g]} for g in range(3)
    ]
    groups = [group for group in groups[: 1 if one_group else 3] if group["params"]]
    optimizer = method.optimizer(groups, torch.optim.SGD, lr=0.1, momentum=0.9, **method.hyper)
    for _ in range(2):
        for turn in optimizer.passes():
            for k, (p, leaf) in enumerate(zip(params, leaves, strict=True)):
                if leaf[3][turn.index]:
                    p.grad = lay_out(torch.cos(p.detach() + k), "contiguous" if plain_layout else leaf[1])
    return [p.detach() for p in params]


@SETTINGS
@hypothesis.given(leaves=models(), name=st.sampled_from(sorted(METHODS)), dtype=st.sampled_from(DTYPES))
def test_layouts_make_no_difference_beyond_the_order_of_sums(leaves, name, dtype):
    """Bitwise where the layout decides nothing but the order in which a norm is summed: so to a few ulp."""
    method = METHODS[name]
    for a, b in zip(run(leaves, method, dtype), run(leaves, method, dtype, plain_layout=True), strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=32 * eps, atol=32 * eps)


@SETTINGS
@hypothesis.given(leaves=models(), name=st.sampled_from(sorted(METHODS)))
def test_how_parameters_are_split_into_groups_makes_no_difference(leaves, name):
    method = METHODS[name]
    split, together = run(leaves, method, torch.float64), run(leaves, method, torch.float64, one_group=True)
    for a, b in zip(split, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@SETTINGS
@hypothesis.given(leaves=models(), name=st.sampled_from(sorted(METHODS)))
def test_a_missing_gradient_counts_as_zero_and_one_missing_throughout_is_skipped(leaves, name):
    """The oracle: the reference loops on a gradient that is zero where none is there."""
    method = METHODS[name]
    generator = torch.Generator().manual_seed(2)
    theta = [torch.randn(shape, generator=generator).double() for shape, *_ in leaves]
    calls = iter(range(8))

    def gradient(values):
        k = next(calls)
        return [
            torch.cos(v + i) if leaf[3][k] else torch.zeros_like(v)
            for i, (v, leaf) in enumerate(zip(values, leaves, strict=True))
        ]

    params = [nn.Parameter(t.clone()) for t in theta]
    optimizer = method.optimizer(params, torch.optim.SGD, lr=0.1, weight_decay=0.5, **method.hyper)
    for turn in optimizer.passes():
        for i, (p, leaf) in enumerate(zip(params, leaves, strict=True)):
            if leaf[3][turn.index]:
                p.grad = torch.cos(p.detach() + i)
    direction = method.reference(gradient, theta, **method.hyper)
    for p, t, d, leaf in zip(params, theta, direction, leaves, strict=True):
        takes_part = any(leaf[3][: method.passes])
        expected = t - 0.1 * (d + 0.5 * t) if takes_part else t
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-9)


@SETTINGS
@hypothesis.given(
    st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=6),
    st.integers(1, 500),
)
def test_chunks_partition_any_shapes_under_any_limit(sizes, limit):
    target = base.Block([torch.zeros(size) for size in sizes], [i % 2 for i in range(len(sizes))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "CPU_CHUNK", limit)
        found = eager.chunks(target)
    for chunk in found:
        assert chunk.numel <= limit
        for piece, view in zip(chunk.pieces, chunk(target.params), strict=True):
            assert target.group[piece.leaf] == chunk.group
            view.add_(1.0)
    assert all(torch.equal(p, torch.ones_like(p)) for p in target.params)


@SETTINGS
@hypothesis.given(st.integers(0, 5000), st.integers(1, 7))
def test_the_tree_sum_is_exact_on_integers_and_independent_of_threads(n, threads):
    values = torch.arange(n, dtype=torch.float64)
    torch.set_num_threads(threads)
    assert float(eager._sum([values] if n else [], torch.device("cpu"))) == n * (n - 1) / 2


# Taking gradients over


def fresh():
    weight = nn.Parameter(torch.ones(8))
    (weight**2).sum().backward()
    return weight, weight.grad.data_ptr()


def test_a_gradient_nobody_else_holds_is_taken_over_without_a_copy():
    weight, address = fresh()
    taken = take(weight)
    assert taken.data_ptr() == address
    assert weight.grad is None


@pytest.mark.parametrize(
    "hold",
    [
        lambda grad: grad,
        lambda grad: grad.view(2, 4),
        lambda grad: grad.detach(),
        lambda grad: grad.untyped_storage(),
        lambda grad: grad.numpy(),
    ],
)
def test_a_gradient_that_somebody_holds_is_copied(hold):
    weight, address = fresh()
    held = hold(weight.grad)
    assert held is not None
    taken = take(weight)
    assert taken.data_ptr() != address
    assert torch.equal(taken, torch.full((8,), 2.0))


def test_a_view_of_a_bucket_is_copied():
    """DistributedDataParallel with gradient_as_bucket_view gives gradients of this kind, and reuses the bucket."""
    bucket = torch.zeros(20)
    weight = nn.Parameter(torch.ones(8))
    weight.grad = bucket[4:12]
    taken = take(weight)
    bucket.fill_(9.0)
    assert torch.equal(taken, torch.zeros(8))


def test_a_user_who_keeps_the_gradients_sees_them_unchanged():
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = gam_fast.GAM([weight], torch.optim.SGD, lr=0.1)
    kept = []
    for _ in optimizer.passes():
        (weight**2).sum().backward()
        kept.append((weight.grad, weight.grad.clone()))
    assert all(torch.equal(live, copy) for live, copy in kept)
