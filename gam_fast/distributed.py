"""Data parallelism: averaging gradients in each pass, or the final direction once, and what is refused."""

from __future__ import annotations

import contextlib
import math
import struct
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

SYNC = ("global", "local")

BUCKET_BYTES = 25 << 20
"""What is averaged at once, as in DistributedDataParallel; larger tensors are averaged in place."""


def data_parallel(model: nn.Module | None) -> DistributedDataParallel | None:
    """The DistributedDataParallel that ``model`` is, or contains (a compiled model contains what it compiles)."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, DistributedDataParallel):
            return module
    return None


def check_supported(model: nn.Module | None, params: Sequence[Tensor]) -> None:
    """Refuse parameters that another library keeps in a way that a step cannot move and restore.

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
    """After a step was undone: no module of ``fully_shard`` keeps a gathered copy of parameters that were moved."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    for module in model.modules() if model is not None else ():
        if isinstance(module, kind):
            module.reshard()


def without_last_sync(model: nn.Module | None, batches: Iterable[Any]) -> Generator[Any, None, None]:
    """Yield the batches; a DistributedDataParallel averages gradients with the last of them only.

    Each is read when it is asked for; with a DistributedDataParallel the one after it as well, to know the last.
    """
    parallel = data_parallel(model)
    if parallel is None:
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
    """The mean over the processes of the DistributedDataParallel in ``model``, with the same bits on all of them.

    Gradients that were averaged are alike on all, but a decision on the number of passes has to be one and the same.
    """
    parallel = data_parallel(model)
    if parallel is None:
        return value
    said = torch.tensor(value, dtype=torch.float64, device=device)
    distributed.all_reduce(said, group=parallel.process_group)
    return float(said) / distributed.get_world_size(parallel.process_group)


@dataclass(frozen=True)
class Agreement:
    """What the processes told each other at the end of a step.

    Attributes:
        failed: the ranks that left the step by an exception.
        nonfinite: the ranks on which a gradient was not finite.
        present: for each parameter, whether any process has a gradient for it.
        values: a number of each rank's.
    """

    failed: list[int]
    nonfinite: list[int]
    present: list[bool]
    values: list[float]


class LocalSync:
    """A step whose passes stay on each process (m-sharpness): only the final direction is averaged.

    Args:
        model: the model; gradients of a DistributedDataParallel in it are not averaged during the passes, and its
            buffers are those of rank 0 at the start of a step, as in its own forward.
        device: where the processes talk.

    Raises:
        ValueError: a DistributedDataParallel with ``static_graph=True``, which records its graph while it averages.
    """

    def __init__(self, model: nn.Module | None, device: torch.device) -> None:
        self._model = data_parallel(model)
        if self._model is not None and self._model.static_graph:
            raise ValueError(
                "sync='local' with DistributedDataParallel(static_graph=True): torch records the graph in a pass whose "
                "gradients are averaged, and there is none; leave static_graph out, or use sync='global'"
            )
        self._group: Any = self._model.process_group if self._model is not None else distributed.group.WORLD
        self._device = device
        self._world = distributed.get_world_size(self._group)
        self._rank = distributed.get_rank(self._group)
        self._stack = contextlib.ExitStack()
        self._agreed = False

    @staticmethod
    def is_needed() -> bool:
        """Return whether there are several processes."""
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    def begin(self) -> None:
        """Before the first pass."""
        if self._model is None:
            return
        self._stack.enter_context(self._model.no_sync())
        if self._model.broadcast_buffers:
            source = distributed.get_global_rank(self._group, 0)
            for flat, parts in _buckets(list(self._model.module.buffers())):
                distributed.broadcast(flat, source, group=self._group)
                _scatter(flat, parts)

    def agree(self, present: Sequence[bool], *, nonfinite: bool = False, value: float = 0.0) -> Agreement:
        """All processes learn what each has to say; each calls this once a step, or :meth:`give_up`."""
        return self._tell(present, nonfinite=nonfinite, value=value)

    def exchange(self, value: float, count: int) -> Agreement:
        """In the course of a step: a number that is not negative, of each process; one that has given up has none.

        Those that hear of one that has given up leave the step too, and say nothing more.
        """
        found = self._tell([False] * count, value=value)
        self._agreed = bool(found.failed)
        return found

    def give_up(self, count: int) -> None:
        """This process leaves the step by an exception; the others, which have ``count`` parameters too, are told."""
        if not self._agreed:
            self._tell([False] * count, failed=True)

    def _tell(
        self, present: Sequence[bool], *, nonfinite: bool = False, failed: bool = False, value: float = 0.0
    ) -> Agreement:
        """One all-reduce, which is the same whatever is said, so that one that gives up is heard by all."""
        self._agreed = True
        world, rank = self._world, self._rank
        said = [0] * (3 * world)
        said[rank], said[world + rank] = int(failed), int(nonfinite)
        (said[2 * world + rank],) = struct.unpack("<q", struct.pack("<d", value if value < math.inf else math.inf))
        flags = torch.tensor([*said, *map(int, present)], dtype=torch.int64, device=self._device)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=self._group)
        heard = flags.tolist()
        bits = heard[2 * world : 3 * world]
        ranks = range(world)
        return Agreement(
            [rank for rank in ranks if heard[rank]],
            [rank for rank in ranks if heard[world + rank]],
            [bool(flag) for flag in heard[3 * world :]],
            list(struct.unpack(f"<{world}d", struct.pack(f"<{world}q", *bits))),
        )

    def average(self, tensors: Sequence[Tensor]) -> None:
        """The mean over the processes, in place; the tensors are in the same order on each. Same bits on all."""
        pending: list[tuple[Any, Tensor, Sequence[Tensor]]] = []
        for flat, parts in _buckets(tensors):
            flat.mul_(1.0 / self._world)  # before the sum, which could overflow in half precision
            pending.append((distributed.all_reduce(flat, group=self._group, async_op=True), flat, parts))
            if len(pending) > 1:
                self._finish(*pending.pop(0))
        for entry in pending:
            self._finish(*entry)

    @staticmethod
    def _finish(work: Any, flat: Tensor, parts: Sequence[Tensor]) -> None:
        work.wait()
        _scatter(flat, parts)

    def close(self) -> None:
        """After the step."""
        self._stack.close()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """Flat copies of tensors of one device and dtype, up to :data:`BUCKET_BYTES`; a large tensor itself."""
    open_: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    filled: dict[tuple[torch.device, torch.dtype], int] = {}
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES and tensor.is_contiguous():
            yield tensor, ()
            continue
        key = (tensor.device, tensor.dtype)
        if filled.get(key, 0) + size > BUCKET_BYTES and key in open_:
            yield _flatten(open_[key]), open_.pop(key)
            filled[key] = 0
        open_.setdefault(key, []).append(tensor)
        filled[key] = filled.get(key, 0) + size
    for bucket in open_.values():
        yield _flatten(bucket), bucket


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def _scatter(flat: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy a bucket back to where it came from."""
    for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True) if parts else ():
        part.copy_(values.view(part.shape))
