"""All primitives of a backend on the same input, and what it takes for two results to be the same."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from gam_fast.backends import base


class SGDGroup(NamedTuple):
    """Hyper-parameters of :class:`torch.optim.SGD`."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool


class AdamGroup(NamedTuple):
    """Hyper-parameters of :class:`torch.optim.Adam` and :class:`torch.optim.AdamW`."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool
    maximize: bool


def sgd(backend, leaves, d, buffers, first, groups):
    """The update of SGD; ``first``: for each leaf, whether it is its first step."""
    backend.update(leaves, d, "sgd", [buffers], groups, [(0.0,), (1.0,)], [int(new) for new in first])


def adam(backend, leaves, d, average, square, largest, steps, groups):
    """The update of Adam; ``steps``: the number of each leaf's step, already advanced."""
    decays = [(0.0, 1.0 - h.lr * h.weight_decay) if h.decoupled else (h.weight_decay, 1.0) for h in groups]
    rows = [(h.beta1, h.beta2, h.eps, *decay, h.maximize) for h, decay in zip(groups, decays, strict=True)]
    options = [
        (groups[g].lr / (1.0 - groups[g].beta1 ** t), math.sqrt(1.0 - groups[g].beta2 ** t))
        for g, t in zip(leaves.group, steps, strict=True)
    ]
    largest = [top if groups[g].amsgrad else None for top, g in zip(largest, leaves.group, strict=True)]
    backend.update(leaves, d, "adam", [average, square, largest], rows, options, list(range(len(options))))


def lion(backend, leaves, d, average, groups):
    """The update of Lion; groups of lr, β₁, β₂, coupled decay, the factor of decoupled decay, maximize."""
    backend.update(leaves, d, "lion", [average], groups, [()], [0] * len(leaves.params))


def tensors(dtype, seed, shapes=((70_001,), (33,), (), (0,), (5, 7))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run_all(backend, dtype, shapes=((70_001,), (33,), (), (0,), (5, 7)), device="cpu"):
    """Everything that the primitives make of the same input, by name."""

    def make(seed):
        return [tensor.to(device) for tensor in tensors(dtype, seed, shapes)]

    count = len(shapes)
    group = [i % 2 for i in range(count)]
    found = {}

    def leaves(saved=True):
        return base.Block(make(1), group, make(2), saved)

    d = base.Direction(
        [make(3), make(4), make(5)],
        [[0.1, 1.0], [0.3, 0.0], [-0.2, 0.7]],
        [[0.3, 0.2]] * 3,
        products=[[6.0, 5.0, 7.0], [4.0, 2.0, 3.0]],
        gamma=[0.1, 0.4],
        limit=0.9,
    )
    m = base.Direction(d.terms, [[1.0, 0.0], [0.5, 2.0], [0.0, 0.0]])
    a, b, c = d.terms
    found["norm"] = [backend.square_norm(leaves(), a)]
    found["norm of difference"] = [backend.square_norm(leaves(), a, b, [0.1, 0.0])]
    found["products"] = [backend.inner_products(leaves(), base.Direction(d.terms, d.p), m, 2)]
    for name, saved, from_start, eta in (("first", False, False, None), ("far", True, True, [0.1, 0.0])):
        target = leaves(saved)
        into = make(6)
        fold = base.FoldInto(into, c, [0.3, 1.0], [0.7, -0.2])
        other = None if name == "first" else b
        backend.perturb(target, a, other, [0.1, -0.2], 0.3, from_start=from_start, eta=eta, fold=fold)
        found[f"perturb {name}"] = [*target.params, *target.backup, *into]
    target, out = leaves(), make(7)
    backend.direction(target, d, out)
    found["direction"] = [*out, *target.params]
    for nesterov in (False, True):
        target, buffers = leaves(), make(8)
        rows = [SGDGroup(0.1, 0.9, 0.0 if nesterov else 0.1, 0.01, nesterov, g == 1) for g in range(2)]
        sgd(backend, target, d, buffers, [i == 1 for i in range(count)], rows)
        found[f"sgd {nesterov}"] = [*target.params, *buffers]
    for amsgrad in (False, True):
        target, average, square = leaves(), make(8), [t.abs() for t in make(9)]
        largest = [t.abs() for t in make(10)] if amsgrad else [None] * count
        rows = [AdamGroup(0.1, 0.9, 0.99, 1e-3, 0.01, g == 0, amsgrad, g == 1) for g in range(2)]
        adam(backend, target, d, average, square, largest, [float(i + 1) for i in range(count)], rows)
        found[f"adam {amsgrad}: state"] = [*average, *square, *(t for t in largest if t is not None)]
        found[f"adam {amsgrad}: params"] = target.params
    target, average = leaves(), make(8)
    lion(backend, target, d, average, [(0.1, 0.9, 0.99, 0.0, 0.999, 0.0), (0.2, 0.3, 0.4, 0.01, 1.0, 1.0)])
    found["lion"] = [*target.params, *average]
    return found


def same_bits(a, b):
    """Equal to the last bit, NaN included; zeros of either sign are equal."""
    return all(
        torch.equal(torch.nan_to_num(x.cpu(), nan=7.0), torch.nan_to_num(y.cpu(), nan=7.0))
        for x, y in zip(a, b, strict=True)
    )
