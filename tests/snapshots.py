"""All that a step may touch, noted and compared bit for bit."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import re
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Record the names of torch's operations, except those that match ``but``."""

    def __init__(self, but="nothing"):
        super().__init__()
        self.names, self._but = [], but

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not re.match(self._but, str(function)):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


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


@contextmanager
def unchanged(model, optimizer):
    """The block leaves no trace."""
    before = everything(model, optimizer)
    yield
    assert_same(before, everything(model, optimizer))


def leave(optimizer, body, index, error=KeyError):
    """A step that an error ends in pass ``index``, after its body."""

    def closure(turn):
        body()
        if turn.index == index:
            raise error

    with pytest.raises(error):
        optimizer.step(closure)


def assert_close(ours, theirs, rtol=0.0, atol=0.0):
    """The parameters of two modules; bit for bit where no tolerance is given."""
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=rtol, atol=atol)


def through_a_file(value, weights_only=True):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": partial(through_a_file, weights_only=False),
}
"""Ways to copy a model with its optimizer."""


def assert_same(before, after):
    for old, new in itertools.chain(zip(before[:2], after[:2], strict=True)):
        assert old.keys() == new.keys()
        for key, value in old.items():
            assert torch.equal(value, new[key]), key
    assert before[2:5] == after[2:5]
    assert torch.equal(before[5], after[5])


def assert_equal(ours, theirs):
    """Parameters and buffers of two modules, bit for bit."""
    for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
