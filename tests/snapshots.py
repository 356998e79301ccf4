"""All that a step may touch, noted and compared bit for bit."""

from __future__ import annotations

import itertools

import torch


def everything(model, optimizer):
    """All that a step may touch: parameters and buffers, flags, random state, the state of the optimizer."""
    state = {
        f"{id(p)}/{key}": value.clone() if isinstance(value, torch.Tensor) else value
        for p, entry in optimizer.state.items()
        for key, value in entry.items()
    }
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()] + [m.training for m in model.modules()]
    momenta = [m.momentum for m in model.modules() if hasattr(m, "momentum")]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return tensors, state, flags, momenta, groups, torch.get_rng_state()


def assert_same(before, after):
    for old, new in itertools.chain(zip(before[:2], after[:2], strict=True)):
        assert old.keys() == new.keys()
        for key, value in old.items():
            assert torch.equal(value, new[key]), key
    assert before[2:5] == after[2:5]
    assert torch.equal(before[5], after[5])


def assert_equal(ours, theirs):
    """Parameters and buffers of two models, bit for bit."""
    for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def assert_near(ours, theirs, tolerance=1e-10):
    """Parameters of two models, up to rounding."""
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
