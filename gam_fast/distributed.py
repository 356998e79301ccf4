"""Several processes: DistributedDataParallel, sharded parameters, and checks for unsupported libraries.

With a ``DTensor`` (``fully_shard``, tensor parallelism) the engine works on the local part, by the same primitives as
on any other tensor. Only sums over all elements, that is, norms and inner products, are added up over the processes.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module | None) -> DistributedDataParallel | None:
    """Return the DistributedDataParallel that ``model`` is or contains, as a compiled model does."""
    if model is None or not (distributed.is_available() and distributed.is_initialized()):
        return None  # without a search, which takes milliseconds in a deep model
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


def check_supported(model: nn.Module | None, params: Sequence[Tensor]) -> None:
    """Refuse parameters that another library manages so that a step cannot move and restore them.

    Raises:
        TypeError: FSDP1 or DeepSpeed; the message says what to use.
    """
    modules = list(model.modules()) if model is not None else []
    first_fsdp: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(module, first_fsdp) for module in modules) or any(
        getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False) for param in params
    ):
        raise TypeError(
            "FullyShardedDataParallel (FSDP1) is not supported: it flattens parameters, and its state is not that of "
            "the optimizer. Use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    is_engine = any(type(module).__module__.split(".")[0] == "deepspeed" for module in modules)
    if is_engine or any(hasattr(param, "ds_id") for param in params):
        raise TypeError(
            "DeepSpeed is not supported: it takes gradients away in the backward pass and steps by itself. Use "
            "torch.distributed.fsdp.fully_shard (ZeRO-3), or DistributedDataParallel with "
            "torch.distributed.optim.ZeroRedundancyOptimizer as base_optimizer (ZeRO-1)"
        )


def reshard(model: nn.Module | None) -> None:
    """Free the copies of parameters that modules of ``fully_shard`` have gathered, before the parameters are moved.

    The root keeps them after a forward without a backward, as in an evaluation, and would use them again.
    """
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    for module in model.modules() if model is not None and kind is not None else ():
        if isinstance(module, kind):
            module.reshard()


def refuse_join(model: nn.Module | None, what: str) -> None:
    """Refuse a step in which processes whose batches have run out would have to take part.

    Args:
        model: the model.
        what: what they would have to take part in.

    Raises:
        RuntimeError: the step is in a block of ``DistributedDataParallel.join()``.
    """
    if getattr(getattr(data_parallel(model), "_join_config", None), "enable", False):
        raise RuntimeError(
            f"{what} in DistributedDataParallel.join(): the processes whose batches have run out take no part in it, "
            "and the others would wait, or take other passes. Give all processes the same number of batches "
            "(drop_last=True of the sampler), without join()"
        )


def without_last_sync(model: nn.Module | None, batches: Iterable[Any]) -> Generator[Any, None, None]:
    """Yield the batches; a DistributedDataParallel averages gradients only with the last one.

    Each batch is read when it is asked for. A DistributedDataParallel reads one batch ahead, to know the last; with
    ``static_graph=True`` it averages with each.
    """
    parallel = data_parallel(model)
    if parallel is None or parallel.static_graph:  # which records its graph in a pass that averages
        yield from batches
        return
    held: list[Any] = []
    for batch in batches:
        if held:
            with parallel.no_sync():
                yield held.pop()
        held.append(batch)
    yield from held


def mean_over_processes(value: float, model: nn.Module | None, device: torch.device) -> float:
    """Return the mean over the processes of ``model``'s DistributedDataParallel, with the same bits on all of them.

    Averaged gradients are alike on all processes, but a decision on the number of passes must be exactly the same.
    """
    parallel = data_parallel(model)
    if parallel is None:
        return value
    said = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(said, group=parallel.process_group)
    return float(said) / distributed.get_world_size(parallel.process_group)


@dataclass(frozen=True)
class Layout:
    """The distribution of a parameter over a :class:`torch.distributed.DeviceMesh`."""

    mesh: Any
    sharded: tuple[bool, ...]
    """For each dimension of the mesh, whether its processes hold different parts, and not copies."""


def is_sharded(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is a DTensor.

    >>> is_sharded(torch.zeros(2))
    False
    """
    module = sys.modules.get("torch.distributed.tensor")  # if it was not imported, there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def layout_of(tensor: Tensor) -> Layout | None:
    """Return the layout of a DTensor, ``None`` for any other tensor.

    Raises:
        TypeError: a ``Partial`` DTensor, whose parts are summands; no parameter can be one.
    """
    if not is_sharded(tensor):
        return None
    param: Any = tensor
    if any(placement.is_partial() for placement in param.placements):
        raise TypeError(
            f"a parameter of shape {tuple(tensor.shape)} has placements {param.placements}: distribute it by "
            "Shard or Replicate"
        )
    return Layout(param.device_mesh, tuple(not placement.is_replicate() for placement in param.placements))


def local(tensor: Tensor) -> Tensor:
    """Return the part that this process holds, in the same memory; ``tensor`` itself if it is no DTensor."""
    if not is_sharded(tensor):
        return tensor
    held: Any = tensor
    with torch.no_grad():
        part: Tensor = held.to_local()
    return part


def local_gradient(param: Tensor) -> Tensor:
    """Return the part of ``param.grad`` that this process holds, distributed like the parameter.

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


def spread(part: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor with local part ``part`` distributed like ``like``; ``part`` if ``like`` is no DTensor."""
    if not is_sharded(like):
        return part
    param: Any = like
    whole: Tensor = type(param).from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.size(), stride=param.stride()
    )
    return whole


def add_up_over_processes(values: Sequence[Tensor], layouts: Sequence[Layout | None]) -> list[Tensor]:
    """Sum each value over the processes that hold other parts of the tensor it was computed from.

    All values have one shape. There is one all-reduce per mesh dimension that shards a tensor: one for
    ``fully_shard``, hybrid or not. The result has the same bits on all processes.
    """
    out = list(values)
    meshes = dict.fromkeys(layout.mesh for layout in layouts if layout is not None)
    for mesh in meshes:
        for dim in range(mesh.ndim):
            spread_out = [layout is not None and layout.mesh == mesh and layout.sharded[dim] for layout in layouts]
            chosen = [i for i, is_spread in enumerate(spread_out) if is_spread]
            if not chosen or mesh.size(dim) == 1:
                continue
            together = torch.stack([out[i] for i in chosen])
            reduced = together.to(mesh.device_type)
            distributed.all_reduce(reduced, group=mesh.get_group(dim))
            for i, value in zip(chosen, reduced.to(together.device).unbind(), strict=True):
                out[i] = value
    return out
