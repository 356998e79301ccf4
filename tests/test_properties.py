"""Properties over shapes, layouts, group splits and missing gradients, drawn by hypothesis."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cases import METHODS
from torch import nn

from gam_fast.backends import base, eager

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


@pytest.mark.usefixtures("_on_eager_and_native")
@SETTINGS
@hypothesis.given(leaves=models(), name=st.sampled_from(sorted(METHODS)))
def test_layouts_groups_and_missing_gradients_make_no_difference(leaves, name):
    """The oracle: plain loops over one list, on a gradient that is zero where none is there.

    A parameter that never has a gradient is left alone by weight decay too.
    """
    method = METHODS[name]
    generator = torch.Generator().manual_seed(2)
    theta = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape, *_ in leaves]
    calls = iter(range(8))

    def gradient(values):
        k = next(calls)
        return [
            torch.cos(v + i) if leaf[3][k] else torch.zeros_like(v)
            for i, (v, leaf) in enumerate(zip(values, leaves, strict=True))
        ]

    params = [nn.Parameter(lay_out(t.clone(), leaf[1])) for t, leaf in zip(theta, leaves, strict=True)]
    groups = [{"params": [p for p, leaf in zip(params, leaves, strict=True) if leaf[2] == g]} for g in range(3)]
    groups = [group for group in groups if group["params"]]
    optimizer = method.optimizer(groups, torch.optim.SGD, lr=0.1, weight_decay=0.5, **method.hyper)
    for turn in optimizer.passes():
        for i, (p, leaf) in enumerate(zip(params, leaves, strict=True)):
            if leaf[3][turn.index]:
                p.grad = lay_out(torch.cos(p.detach() + i), leaf[1])
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
