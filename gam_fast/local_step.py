"""A step whose passes stay on each process (m-sharpness): agreement at its end, and the mean of the directions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn

from .backends.base import Direction
from .distributed import data_parallel
from .finite import FiniteWatch, listed
from .parameters import ParameterBlock, StepParameters, materialise

BUCKET_BYTES = 25 << 20
"""Bytes averaged at once, as in DistributedDataParallel; larger tensors are averaged in place."""


class LocalSync:
    """The processes of a local step.

    Args:
        model: the model; gradients of a DistributedDataParallel in it are not averaged during the passes, and its
            buffers are those of rank 0 at the start of a step, as in its own forward.
        device: where the processes talk.
        recipe: the name of the recipe, for messages.

    Raises:
        ValueError: a DistributedDataParallel with ``static_graph=True``, which records its graph while it averages.
    """

    def __init__(self, model: nn.Module | None, device: torch.device, recipe: str) -> None:
        self._model = data_parallel(model)
        if self._model is not None and self._model.static_graph:
            raise ValueError(
                "sync='local' with DistributedDataParallel(static_graph=True): torch records the graph in a pass whose "
                "gradients are averaged, and there is none; leave static_graph out, or use sync='global'"
            )
        self._group: Any = self._model.process_group if self._model is not None else distributed.group.WORLD
        self._device = device
        self._recipe = recipe
        self._world = distributed.get_world_size(self._group)
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

    def agree(self, blocks: StepParameters, watch: FiniteWatch, change: float | None) -> float | None:
        """All processes take the step or none does, with the same parameters; each calls this, or :meth:`give_up`.

        Returns the mean of ``change`` over the processes; ``None`` where there is none.

        Raises:
            RuntimeError: another process has left the step by an exception.
            NonFiniteGradientError, SkipStep: another has found a gradient not finite.
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
        """The mean of a number that is not negative over the processes, in the course of a step.

        Those that hear of one that has given up leave the step too, and say nothing more.

        Raises:
            RuntimeError: another process has left the step by an exception.
        """
        _, _, mean = self._tell([0] * len(blocks.params), value=value)
        self._agreed = False
        return mean

    def give_up(self, count: int) -> None:
        """This process leaves the step by an exception; the others, which have ``count`` parameters too, are told."""
        if not self._agreed:
            self._tell([0] * count, failed=True)

    def _tell(
        self, present: Sequence[int], *, nonfinite: bool = False, failed: bool = False, value: float = 0.0
    ) -> tuple[list[int], list[int], float]:
        """Return the ranks with a gradient that is not finite, what is present on any, and the mean of the values.

        One all-reduce, which is the same whatever is said, so that one that gives up is heard by all: a maximum of
        bits, whose order is that of the numbers, as none is negative.
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
        """The mean of the directions over the processes, of a norm of at most ``limit``."""
        made = []
        for block, direction in directions:
            tensors = materialise(block, direction)
            own = [
                x.clone(memory_format=torch.preserve_format) if x is param.grad else x  # as it is written to
                for param, x in zip(block.owners, tensors, strict=True)
            ]
            made.append((block, own))
        of = {param: x for block, xs in made for param, x in zip(block.owners, xs, strict=True)}
        self.average([of[param] for param in blocks.params if param in of])  # in the same order on each process
        ones = [[1.0] * len(gamma)]
        products = None if limit is None else blocks.inner_products([(block, [xs]) for block, xs in made], ones)
        return [(block, Direction([xs], ones, None, products, gamma, limit)) for block, xs in made]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """The mean over the processes, in place. Same bits on all."""
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
        """After the step."""
        self._stack.close()


def _buckets(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """Flat copies of tensors of one device and dtype, up to :data:`BUCKET_BYTES`; a large tensor itself."""
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
    """Copy a bucket back to where it came from."""
    for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True) if parts else ():
        part.copy_(values.view(part.shape))
