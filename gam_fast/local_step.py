"""Local steps (m-sharpness): each process takes its own passes; at the end they agree and average directions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .backends.base import Direction
from .distributed import data_parallel, refuse_join
from .finite import FiniteWatch, listed
from .parameters import ParameterBlock, StepParameters, materialise

BUCKET_BYTES = 25 << 20
"""Bytes per bucket, as in DistributedDataParallel. Larger tensors are averaged in place."""


class LocalSync:
    """Communication between the processes of a local step.

    Args:
        model: the model. If it contains a DistributedDataParallel, gradients are not averaged during the passes, and
            the buffers at the start of a step are those of rank 0, as in its own forward.
        device: the device of the tensors that are communicated.
        recipe: the name of the recipe, for messages.

    Raises:
        ValueError: a DistributedDataParallel with ``static_graph=True``, which records its graph while it averages; or
            several.
        RuntimeError: the step is in a block of ``DistributedDataParallel.join()``.
    """

    def __init__(self, model: nn.Module | None, device: torch.device, recipe: str) -> None:
        self._model = data_parallel(model)
        if self._model is not None and self._model.static_graph:
            raise ValueError(
                "sync='local' with DistributedDataParallel(static_graph=True): torch records the graph in a pass whose "
                "gradients are averaged, and there is none; leave static_graph out, or use sync='global'"
            )
        modules = [] if model is None or model is self._model else model.modules()
        if sum(isinstance(module, DistributedDataParallel) for module in modules) > 1:
            raise ValueError(
                "sync='local' with several DistributedDataParallels: wrap the modules in one, or use sync='global'"
            )
        refuse_join(model, "sync='local'")
        self._group: Any = self._model.process_group if self._model is not None else distributed.group.WORLD
        self._device = device
        self._recipe = recipe
        self._world = distributed.get_world_size(self._group)
        self._stack = contextlib.ExitStack()
        self._agreed = False

    @staticmethod
    def is_needed() -> bool:
        """Return whether torch.distributed has several processes."""
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    def begin(self) -> None:
        """Prepare for the first pass."""
        if self._model is None:
            return
        self._stack.enter_context(self._model.no_sync())
        self._model.require_forward_param_sync = False  # a process that leaves before its forward could not take part
        if self._model.broadcast_buffers:
            source = distributed.get_global_rank(self._group, 0)
            for flat, parts in _buckets(list(self._model.module.buffers())):
                distributed.broadcast(flat, source, group=self._group)
                _scatter(flat, parts)

    def agree(self, blocks: StepParameters, watch: FiniteWatch, change: float | None) -> float | None:
        """Let all processes take the step, with the same parameters, or none. Each calls this or :meth:`give_up`.

        Return the mean of ``change`` over the processes; ``None`` for ``None``.

        Raises:
            RuntimeError: another process has left the step by an exception.
            NonFiniteGradientError, SkipStep: another process has found a non-finite gradient.
        """
        present = list(blocks.flags)
        nonfinite, anywhere, mean = self._tell(present, nonfinite=not watch.is_finite(), value=change or 0.0)
        if nonfinite:
            watch.refuse(f"a pass of {self._recipe} on rank {listed(nonfinite)}")
        unflagged = [i for i, (here, there) in enumerate(zip(present, anywhere, strict=True)) if there and not here]
        if unflagged:
            blocks.activate(unflagged)
        return None if change is None else mean

    def mean(self, blocks: StepParameters, value: float) -> float:
        """Return the mean of a non-negative number over the processes, during a step.

        If another process has given up, this one leaves the step too, without further communication.

        Raises:
            RuntimeError: another process has left the step by an exception.
        """
        _, _, mean = self._tell([0] * len(blocks.params), value=value)
        self._agreed = False
        return mean

    def give_up(self, count: int) -> None:
        """Tell the other processes, which have ``count`` parameters too, that this one left by an exception."""
        if not self._agreed:
            self._tell([0] * count, failed=True)

    def _tell(
        self, present: Sequence[int], *, nonfinite: bool = False, failed: bool = False, value: float = 0.0
    ) -> tuple[list[int], list[int], float]:
        """Return the ranks with a non-finite gradient, the parameters present on any rank, and the mean of ``value``.

        This is a single all-reduce of one fixed shape for all messages, so that every process hears of one that gives
        up. It takes the maximum of bits; for non-negative numbers, the order of the bits is that of the numbers.
        """
        self._agreed = True
        said = torch.zeros(3, self._world, dtype=torch.float64, device="cpu")
        value = value if value < math.inf else math.inf  # NaN too
        said[:, distributed.get_rank(self._group)] = said.new_tensor([failed, nonfinite, value])
        flags = torch.tensor(present, dtype=torch.int64, device="cpu")
        heard = torch.cat([said.view(torch.int64).flatten(), flags]).to(self._device)
        distributed.all_reduce(heard, distributed.ReduceOp.MAX, group=self._group)
        numbers, flags = heard.cpu().split([said.numel(), len(present)])
        gone, bad, values = numbers.view(torch.float64).view_as(said).tolist()
        left = [rank for rank, flag in enumerate(gone) if flag]
        if left and not failed:
            raise RuntimeError(
                f"this step of {self._recipe} was left by an exception on rank {listed(left)}; it is undone on all "
                "ranks"
            )
        return [rank for rank, flag in enumerate(bad) if flag], flags.tolist(), sum(values) / self._world

    def averaged(
        self,
        blocks: StepParameters,
        directions: Sequence[tuple[ParameterBlock, Direction]],
        gamma: list[float],
        limit: float | None,
    ) -> list[tuple[ParameterBlock, Direction]]:
        """Return the mean of the directions over the processes, clipped to norm ``limit``."""
        made = []
        for block, direction in directions:
            tensors = materialise(block, direction)
            own = [
                x.clone(memory_format=torch.preserve_format) if x is param.grad else x  # because it is written to
                for param, x in zip(block.owners, tensors, strict=True)
            ]
            made.append((block, own))
        of = {param: x for block, xs in made for param, x in zip(block.owners, xs, strict=True)}
        self.average([of[param] for param in blocks.params if param in of])  # in the same order on each process
        ones = [[1.0] * len(gamma)]
        products = None
        if limit is not None:  # the order of the sums, and so their last bits, may differ between processes
            found = blocks.inner_products([(block, [xs]) for block, xs in made], ones)
            said = torch.as_tensor(found, dtype=torch.float64, device=self._device)
            distributed.broadcast(said, distributed.get_global_rank(self._group, 0), group=self._group)
            products = said if isinstance(found, Tensor) else said.tolist()
        return [(block, Direction([xs], ones, None, products, gamma, limit)) for block, xs in made]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average over the processes in place, with the same bits on all."""
        pending: tuple[Any, Tensor, Sequence[Tensor]] | None = None
        for flat, parts in _buckets(tensors):
            flat.mul_(1.0 / self._world)  # before the sum, which could overflow in half precision
            work = distributed.all_reduce(flat, group=self._group, async_op=True)
            self._finish(pending)
            pending = work, flat, parts
        self._finish(pending)

    @staticmethod
    def _finish(pending: tuple[Any, Tensor, Sequence[Tensor]] | None) -> None:
        if pending is not None:
            work, flat, parts = pending
            work.wait()
            _scatter(flat, parts)

    def close(self) -> None:
        """End the step."""
        self._stack.close()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """Yield buckets: copies of tensors of one device and dtype up to :data:`BUCKET_BYTES`, or one large tensor."""
    open_: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        if tensor.nbytes >= BUCKET_BYTES and tensor.is_contiguous():
            yield tensor, ()
            continue
        key = tensor.device, tensor.dtype
        bucket, size = open_.get(key, ([], 0))
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield _flat(bucket), bucket
            bucket, size = [], 0
        bucket.append(tensor)
        open_[key] = bucket, size + tensor.nbytes
    for bucket, _ in open_.values():
        yield _flat(bucket), bucket


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def _scatter(flat: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy a bucket back to its tensors."""
    for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True) if parts else ():
        part.copy_(values.view(part.shape))
