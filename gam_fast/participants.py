"""The parameters that take part in a step, by device, and the gradients that are held for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .backends.base import Backend, Direction, Leaves, TensorList
from .ownership import as_dtype, is_alike, is_large_on_cpu, take, take_sole
from .sharded import Layout, is_sharded, layout_of, local, local_gradient, take_local


@dataclass(eq=False)
class Shard:
    """The leaves of one device and one layout over processes, and the gradients being held for them, by vector.

    Attributes:
        backend: what works on them.
        leaves: what it works on.
        layout: how they are spread over processes, ``None`` where each process has all of them.
        owners: the parameters as the user has them; the leaves are what this process holds of each.
        grads: for each vector of the recipe that is held, one tensor a leaf.
    """

    backend: Backend
    leaves: Leaves = field(default_factory=Leaves)
    owners: TensorList = field(default_factory=list)
    layout: Layout | None = None
    grads: dict[int, TensorList] = field(default_factory=dict)


class Participants:
    """All parameters of a step, and those of them that had a gradient so far.

    Args:
        groups: the parameter groups.
        select: the backend of a device.
        recipe: the name of the recipe, for messages.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], select: Callable[[torch.device], Backend], recipe: str
    ) -> None:
        self.groups = groups
        self.params = [(param, g) for g, group in enumerate(groups) for param in group["params"]]
        self._select = select
        self._recipe = recipe
        self._shards: dict[tuple[torch.device, Layout | None], Shard] = {}
        self._active: dict[Tensor, Shard] = {}
        self._spare: dict[Tensor, Tensor] = {}
        self.sharded = any(is_sharded(param) for param, _ in self.params)
        self._versions: list[tuple[Tensor, int]] = []

    def __iter__(self) -> Iterator[Shard]:
        return iter(self._shards.values())

    def __len__(self) -> int:
        return len(self._shards)

    def __contains__(self, param: Tensor) -> bool:
        return param in self._active

    def clear_gradients(self, *, recycle: bool) -> None:
        """No parameter has a gradient. With ``recycle``, large ones on a CPU are kept to become the backup."""
        recycle = recycle and not self._active and not self.sharded
        for param, _ in self.params:
            if recycle and param.grad is not None and is_large_on_cpu(param):
                spare = take_sole(param)
                if spare is not None and is_alike(spare, param):
                    self._spare[param] = spare
            param.grad = None

    def note_versions(self) -> None:
        """From here on, nobody but the engine may write to a parameter."""
        self._versions = [(part, part._version) for part in self._parts()]

    def _parts(self) -> TensorList:
        params = [param for param, _ in self.params]
        return [local(param) for param in params] if self.sharded else params

    def take_in(self, index: int, *, keep: bool, where: str, mend: str) -> None:
        """What is in ``param.grad`` becomes vector ``index``, as the optimizer's own if it is to be kept.

        Raises:
            RuntimeError: a parameter was written to since :meth:`note_versions`; no parameter has a gradient.
            TypeError: a sparse gradient.
        """
        parts = self._parts()
        versions = self._versions or [(part, part._version) for part in parts]
        for (param, group), part, (before, version) in zip(self.params, parts, versions, strict=True):
            # fully_shard puts another tensor in place of the part, in the first forward
            if before._version != version and (part is before or part.data_ptr() == before.data_ptr()):
                raise RuntimeError(
                    f"{self.name(param, group)} was modified during {where}; parameters must stay as the optimizer set "
                    "them until the step is over"
                )
            if param.grad is not None:
                self._check_gradient(param, group)
                if param not in self._active:
                    self.activate(param, group)
        if not any(param.grad is not None for param in self._active):
            raise RuntimeError(f"{where} ended without a gradient for any parameter: {mend}")
        for shard in self:
            missing = [param.grad is None for param in shard.owners]
            shard.grads[index] = [
                torch.zeros_like(part) if absent else as_dtype(self._gradient(param, keep), part.dtype)
                for param, part, absent in zip(shard.owners, shard.leaves.params, missing, strict=True)
            ]

    def _gradient(self, param: Tensor, keep: bool) -> Tensor:
        """The gradient, to be read until the next pass, or to be kept."""
        if self.sharded:
            return take_local(param) if keep else local_gradient(param)
        if keep:
            return take(param)
        assert param.grad is not None
        return param.grad

    def activate(self, param: Tensor, group: int) -> None:
        """Let a parameter take part from now on; in the passes before, its gradient counts as zero."""
        layout = layout_of(param)
        part = local(param)
        shard = self._shards.get((part.device, layout))
        if shard is None:
            held = next(iter(self)).grads if self._shards else {}
            shard = Shard(self._select(part.device), layout=layout, grads={k: [] for k in held})
            self._shards[part.device, layout] = shard
        if shard.leaves.saved:
            shard.leaves.backup.append(part.clone(memory_format=torch.preserve_format))
        shard.leaves.group.append(group)
        shard.owners.append(param)
        shard.leaves.params.append(part)
        for grads in shard.grads.values():
            grads.append(torch.zeros_like(part))
        self._active[param] = shard

    def allocate_backup(self, shard: Shard) -> TensorList:
        """Memory for θ of a shard."""
        leaves = shard.leaves
        fresh = iter(
            shard.backend.allocate(
                [part for owner, part in zip(shard.owners, leaves.params, strict=True) if owner not in self._spare]
            )
        )
        return [self._spare.pop(owner) if owner in self._spare else next(fresh) for owner in shard.owners]

    def drop(self, index: int) -> None:
        """Vector ``index`` is not needed any more."""
        for shard in self:
            del shard.grads[index]
        for param, _ in self.params:
            param.grad = None

    def restore(self) -> None:
        """Put θ back, bit for bit."""
        for shard in self:
            leaves = shard.leaves
            # of an interrupted activate()
            del leaves.backup[len(leaves.params) :], leaves.group[len(leaves.params) :]
            del shard.owners[len(leaves.params) :]
            shard.backend.restore(leaves)

    def release(self) -> None:
        """Let go of all that is held."""
        self._shards.clear()
        self._active.clear()
        self._spare.clear()
        self._versions = []

    def name(self, param: Tensor, group: int) -> str:
        """What messages call a parameter."""
        position = next(i for i, other in enumerate(self.groups[group]["params"]) if other is param)
        names = self.groups[group].get("param_names")
        called = f" ({names[position]})" if names else ""
        return f"parameter {position} of group {group}{called}, of shape {tuple(param.shape)},"

    def _check_gradient(self, param: Tensor, group: int) -> None:
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise TypeError(
                f"{self.name(param, group)} has a gradient of layout {grad.layout}; {self._recipe} needs dense "
                "gradients: construct the module with sparse=False"
            )


@torch.no_grad()
def materialise(shard: Shard, direction: Direction) -> TensorList:
    """The direction as tensors, and θ restored; in the storage of a gradient the engine holds, if it holds one."""
    last = direction.terms[-1]
    plain = (
        len(direction.terms) == 1
        and direction.q is None
        and direction.limit is None
        and all(p == 1.0 for p in direction.p[0])
    )
    if plain:
        shard.backend.restore(shard.leaves)
        return last
    out = direction.terms[0] if len(direction.terms) > 1 else [torch.empty_like(part) for part in shard.leaves.params]
    shard.backend.direction(shard.leaves, direction, out)
    return out
