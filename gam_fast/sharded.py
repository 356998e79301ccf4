"""Parameters that are spread over several processes (``DTensor``, as ``fully_shard`` and tensor parallelism make them).

The engine works on the part of each that this process holds, by the same primitives as on any other tensor. Only the
sums that go over all elements, norms and inner products, are added up over the processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ownership import take


@dataclass(frozen=True)
class Layout:
    """How a parameter is spread over a device mesh.

    Attributes:
        mesh: the :class:`torch.distributed.DeviceMesh`.
        sharded: for each of its dimensions, whether the processes along it hold different parts, and not copies.
    """

    mesh: Any
    sharded: tuple[bool, ...]


def is_sharded(tensor: Tensor) -> bool:
    """Return whether it is a DTensor.

    >>> is_sharded(torch.zeros(2))
    False
    """
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there is none
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether one of them is a DTensor.

    >>> any_sharded([torch.zeros(2)])
    False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))


def layout_of(tensor: Tensor) -> Layout | None:
    """The layout of a DTensor, ``None`` for another tensor.

    Raises:
        TypeError: a DTensor whose parts are to be added up (``Partial``), which no parameter can be.
    """
    if not is_sharded(tensor):
        return None
    distributed: Any = tensor
    if any(placement.is_partial() for placement in distributed.placements):
        raise TypeError(
            f"a parameter of shape {tuple(tensor.shape)} has placements {distributed.placements}: distribute it by "
            "Shard or Replicate"
        )
    sharded = tuple(not placement.is_replicate() for placement in distributed.placements)
    return Layout(distributed.device_mesh, sharded)


def local(tensor: Tensor) -> Tensor:
    """Return the part that this process holds, in the same memory; the tensor itself if it is not a DTensor."""
    if not is_sharded(tensor):
        return tensor
    held: Any = tensor
    with torch.no_grad():
        part: Tensor = held.to_local()
    return part


def local_gradient(param: Tensor) -> Tensor:
    """Return the part of ``param.grad`` that this process holds, spread as the parameter is.

    Raises:
        TypeError: the parameter is a DTensor and its gradient is not.
    """
    grad: Any = param.grad
    if not is_sharded(param):
        return local(grad)
    if not is_sharded(grad):
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} is a DTensor and its gradient is not: compute the loss from "
            "the DTensor itself"
        )
    like: Any = param
    if grad.placements != like.placements or grad.device_mesh != like.device_mesh:
        grad = grad.redistribute(like.device_mesh, like.placements)
    return local(grad)


def take_local(param: Tensor) -> Tensor:
    """As :func:`gam_fast.ownership.take`, of what this process holds.

    The part of a DTensor is copied: that of ``fully_shard`` is a view of what was reduced for a whole module.
    """
    if not is_sharded(param):
        return take(param)
    part = local_gradient(param).clone(memory_format=torch.preserve_format)
    param.grad = None
    return part


def spread(part: Tensor, like: Tensor) -> Tensor:
    """The DTensor of which ``part`` is what this process holds, spread as ``like`` is; ``part`` if that is none."""
    if not is_sharded(like):
        return part
    param: Any = like
    whole: Tensor = type(param).from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.size(), stride=param.stride()
    )
    return whole


def add_up_over_processes(values: Sequence[Tensor], layouts: Sequence[Layout | None]) -> list[Tensor]:
    """Each value summed over the processes that hold other parts of what it was computed from.

    Values have one shape. There is one all-reduce for each dimension of a mesh along which something is sharded: for
    ``fully_shard``, hybrid or not, one. The result has the same bits on all processes.
    """
    out = list(values)
    meshes = dict.fromkeys(layout.mesh for layout in layouts if layout is not None)
    for mesh in meshes:
        for dim in range(mesh.ndim):
            chosen = [
                i
                for i, layout in enumerate(layouts)
                if layout is not None and layout.mesh == mesh and layout.sharded[dim]
            ]
            if not chosen or mesh.size(dim) == 1:
                continue
            together = torch.stack([out[i] for i in chosen])
            device = together.device
            reduced = together if device.type == mesh.device_type else together.to(mesh.device_type)
            torch.distributed.all_reduce(reduced, group=mesh.get_group(dim))
            for i, value in zip(chosen, reduced.to(device).unbind(), strict=True):
                out[i] = value
    return out
