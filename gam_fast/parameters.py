"""The parameters that take part in a step, by device, and the gradients that are held for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import ownership, sums
from .backends.base import (
    Backend,
    Block,
    Bookkeeping,
    Direction,
    PerGroup,
    Products,
    Scalar,
    TensorList,
    Versions,
)
from .backends.eager import EagerBackend
from .ownership import Kind, as_like, kind_of, wider_dtype
from .recipes import Perturbation
from .sharded import Layout, add_up_over_processes, any_sharded, layout_of, local, local_gradient, spread, take_local

Select: TypeAlias = "Callable[[torch.device], Backend]"

BlockKey: TypeAlias = "tuple[Kind, Layout | None, torch.dtype | None]"
"""Kind and layout of the leaves, and the dtype of their vectors where it is another."""

_PARAMS_OF = operator.itemgetter("params")

RECYCLE_BYTES = 1 << 16
"""From this size on, the memory of the step before's last gradient serves as backup (see :meth:`Step.begin`)."""

NEVER = 1 << 62
"""More bytes than any gradient has."""


@dataclass(eq=False)
class ParameterBlock:
    """The leaves of one device, dtype, layout over processes and dtype of vectors, and the gradients held, by vector.

    Those that are not dense in memory, or whose vectors have another dtype, are worked on by ``eager``.

    Attributes:
        backend: what works on them.
        leaves: what it works on.
        layout: how they are spread over processes, ``None`` where each process has all of them.
        owners: the parameters as the user has them; the leaves are what this process holds of each.
        grads: for each vector of the recipe that is held, one tensor a leaf.
    """

    backend: Backend
    leaves: Block = field(default_factory=Block)
    owners: TensorList = field(default_factory=list)
    layout: Layout | None = None
    grads: dict[int, TensorList] = field(default_factory=dict)


class StepParameters:
    """All parameters of a step, and those of them that had a gradient so far.

    Args:
        groups: the parameter groups.
        select: the backend of a device.
        recipe: the name of the recipe, for messages.
        keep_parts: whether gradients that are parts of a buffer of somebody else's stay where they are.

    Attributes:
        params: all parameters, whether they take part or not.
        devices: what they are on.
        on_host: whether reading a sum waits for nothing.
        sharded: whether any is spread over processes.
        flags: for each parameter, whether it takes part.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        select: Select,
        recipe: str,
        *,
        keep_parts: bool = True,
    ) -> None:
        self.params: TensorList = [param for group in groups for param in group["params"]]
        self.sharded = any_sharded(self.params)
        self._group = [g for g, group in enumerate(groups) for _ in group["params"]]
        self._counts = [len(group["params"]) for group in groups]
        self._whole: ParameterBlock | None = None  # of all parameters, if the step before had it
        self._books: Bookkeeping = ownership
        if self.params and not self.sharded:
            self._books = select(self.params[0].device).bookkeeping
        self._all = self._books.hold(self.params)
        self._kinds = self._books.kinds(self._all)
        self._is_usual = not self.sharded and len(self._kinds) == 1 and self._kinds[0][2]
        self.devices = list(dict.fromkeys(device for device, _, _ in self._kinds))
        self.on_host = all(map(sums.reads_are_free, self.devices))
        if len(self.devices) > 1:  # perhaps of several backends
            self._books, self._all = ownership, self.params
        self._start(groups, select, recipe, keep_parts)

    def _start(self, groups: Sequence[dict[str, Any]], select: Select, recipe: str, keep_parts: bool) -> None:
        # all is made anew, as a Ctrl-C may have come in the middle of release()
        self._blocks: dict[BlockKey, ParameterBlock] = {}
        self.all: list[ParameterBlock] = []
        """The blocks."""
        self.only: ParameterBlock | None = None
        """The block, where there is one."""
        self._spare: dict[Tensor, Tensor] = {}
        self.groups = groups
        self._select: Select | None = select  # during the step: it has a hold on the optimizer
        self._recipe = recipe
        self._keep_parts = keep_parts and not self.sharded
        self.flags = bytearray(len(self.params))
        self.named: Iterable[tuple[str, Tensor]] = ()
        """Names of parameters in the model, for messages."""
        self._versions: Versions | None = None
        self._each: list[int] | None = None  # the versions again, where parameters may move that are not trained
        self._parts: TensorList = []  # those that were there when the versions were noted, of sharded parameters
        self.moved: list[int] = []
        """The positions of parameters without a gradient that a pass was seen to move."""

    def again(
        self, groups: Sequence[dict[str, Any]], select: Select, recipe: str, *, keep_parts: bool
    ) -> StepParameters | None:
        """Return the same for another step, if its parameters are the same and of the same kinds; else ``None``."""
        lists = list(map(_PARAMS_OF, groups))
        same_count = self._counts == list(map(len, lists))
        if self.sharded or not same_count or not all(map(operator.is_, chain(*lists), self.params)):
            return None
        self._all = self._books.hold(self.params, self._all)
        if self._books.kinds(self._all) != self._kinds:
            self._books.let_go(self._all)
            return None
        self._start(groups, select, recipe, keep_parts)
        return self

    def present(self) -> list[bool]:
        """For each parameter, whether it takes part."""
        return [flag != 0 for flag in self.flags]

    def clear_gradients(self) -> None:
        """No parameter has a gradient, or (a part of somebody's buffer) one of zeros."""
        self._books.clear_gradients(self._all, NEVER, self._keep_parts)

    def begin_pass(self, *, recycle: bool, each: bool = False) -> None:
        """Clear gradients. From here on, nobody but the engine may write to a parameter that is being trained.

        Args:
            recycle: whether large ones on a CPU are kept to become the backup.
            each: whether parameters may move that are not: what is found changed is then no end of the search.
        """
        recycle = recycle and not self._blocks and not self.sharded
        least, clear = RECYCLE_BYTES if recycle else NEVER, self._books.clear_gradients
        for i, grad in clear(self._all, least, self._keep_parts):
            self._spare[self.params[i]] = grad
        self._parts = [local(param) for param in self.params] if self.sharded else []
        self._versions = self._books.versions(self._parts or self._all)
        self._each = [param._version for param in self._parts or self.params] if each else None

    def _check_versions(self, where: str) -> None:
        if self._versions is None:
            return
        first = self._versions.first_changed(self._parts or self._all)
        if first < 0:
            return
        changed: Sequence[int] = [first]
        if self._each is None and self.params[first].grad is None and not self.flags[first]:
            # it may be one of several; those of which nothing is known are taken to have moved too
            changed = [i for i, param in enumerate(self.params) if param.grad is None and not self.flags[i]]
        elif self._each is not None:
            pairs = zip(self._each, self._parts or self.params, strict=True)
            changed = [i for i, (version, param) in enumerate(pairs) if param._version != version]
        for i in changed:
            # fully_shard puts another tensor in place of the part, in the first forward
            if self.sharded and not self._is_same_memory(i):
                continue
            if self.params[i].grad is not None or self.flags[i]:
                self.refuse_write(i, where)
            self.moved.append(i)

    def refuse_write(self, position: int, where: str) -> NoReturn:
        """Raise the RuntimeError for a parameter that is being trained and was written to."""
        raise RuntimeError(
            f"{self.name(position)} was modified during {where}; parameters must stay as the optimizer set them "
            f"until the step is over, because {self._recipe} evaluates the model at several points. Embedding(max_norm="
            "), an initialisation by the first batch, the first forward of a lazy module and clamping weights in the "
            "forward do that: run such an initialisation once before training, and renormalise or clamp after the "
            "step. (A parameter without a gradient may be moved.)"
        )

    def take_all(self, index: int, *, keep: bool) -> bool:
        """Fast path of :meth:`take_in`. Return False if it does not apply."""
        if self._versions is None or not self._is_usual:
            return False
        block = self.only
        if block is None and self._blocks:
            return False
        if block is not None and block.leaves.params is not self._all:
            return False
        taken = self._books.take_all_gradients(self._all, self._versions, self.flags, keep)
        if taken is None:
            return False
        if block is None and self._whole is not None:
            block = self.only = self._blocks[self._kinds[0], None, None] = self._whole
            self.flags[:] = b"\1" * len(self.flags)
            self.all.append(block)
        elif block is None:
            self.activate(range(len(self.params)), usual=True)
            (block,) = self.all
        block.grads[index] = taken
        return True

    def take_in(self, index: int, *, keep: bool, where: str, mend: str | None, may_write: bool = False) -> None:
        """Take ``param.grad`` in as vector ``index``, as the optimizer's own if it is to be kept.

        Args:
            may_write: whether the forward may have written to parameters, as in a step of one pass.

        Raises:
            RuntimeError: a parameter was written to since :meth:`begin_pass`; no parameter has a gradient, and
                there is a ``mend`` for that.
            TypeError: a sparse gradient.
        """
        if not may_write:
            self._check_versions(where)
        self._look_closely(where, mend)
        for block in self.all:
            block.grads[index] = self._take(block, keep)

    def _look_closely(self, where: str, mend: str | None) -> None:
        """Raise the other errors of :meth:`take_in`, and let those that have their first gradient take part."""
        unflagged, any_gradient, sparse = self._books.survey_gradients(self._all, self.flags)
        if sparse >= 0:
            grad = self.params[sparse].grad
            raise TypeError(
                f"{self.name(sparse)} has a gradient of layout {None if grad is None else grad.layout}; {self._recipe} "
                "needs dense gradients: construct the module with sparse=False"
            )
        if unflagged:
            self.activate(unflagged)
        if not any_gradient and mend is not None:
            raise RuntimeError(f"{where} ended without a gradient for any parameter: {mend}")

    def _take(self, block: ParameterBlock, keep: bool) -> TensorList:
        """The gradients of a block, to be read until the next pass, or to be kept."""
        if block.leaves.vectors is not None:
            return ownership.take_gradients(block.owners, keep, block.leaves.vectors)
        if not self.sharded:
            return block.backend.bookkeeping.take_gradients(block.leaves.params, keep)
        read = take_local if keep else local_gradient
        return [
            torch.zeros_like(part) if param.grad is None else as_like(read(param), part)
            for param, part in zip(block.owners, block.leaves.params, strict=True)
        ]

    def activate(self, positions: Sequence[int], *, usual: bool = False) -> None:
        """Let parameters take part from now on; in the passes before, their gradients count as zero.

        ``usual``: they are of one kind and not sharded, and no gradient has more bits than its parameter.
        """
        places: dict[BlockKey, list[int]] = {}
        if usual or self._all_usual(positions):
            places[self._kinds[0], None, None] = list(positions)
        else:
            for i in positions:
                param = self.params[i]
                key = kind_of(local(param)), layout_of(param), None if self.sharded else wider_dtype(param)
                places.setdefault(key, []).append(i)
        for key, chosen in places.items():
            block = self._blocks.get(key)
            if block is None:
                held = self.all[0].grads if self.all else {}
                (device, _, is_dense), layout, wider = key
                assert self._select is not None
                backend = self._select(device) if wider is None and is_dense else EagerBackend()
                block = ParameterBlock(backend, Block(vectors=wider), layout=layout, grads={k: [] for k in held})
                self._blocks[key] = block
                self.all.append(block)
                self.only = block if len(self.all) == 1 else None
            self._add(block, chosen)

    def _all_usual(self, positions: Sequence[int]) -> bool:
        if not self._is_usual:
            return False
        for param in map(self.params.__getitem__, positions):  # no generator: it takes twice as long
            grad = param.grad
            if grad is None or grad.dtype is not param.dtype:
                return False
        return True

    def _add(self, block: ParameterBlock, positions: Sequence[int]) -> None:
        """A signal may come between any two of these assignments; restore() believes the last of them."""
        owners = [self.params[i] for i in positions]
        parts = [local(param) for param in owners] if self.sharded else owners
        hold, leaves = block.backend.bookkeeping.hold, block.leaves
        leaves.prepared = None
        if leaves.saved:
            copies = [part.clone(memory_format=torch.preserve_format) for part in parts]
            leaves.backup = hold([*leaves.backup, *copies])
        for index, grads in block.grads.items():
            block.grads[index] = hold([*grads, *(torch.zeros_like(part, dtype=leaves.vectors) for part in parts)])
        leaves.group.extend([self._group[i] for i in positions])
        block.owners.extend(owners)
        is_all = len(positions) == len(self.params) and not self.sharded and block.backend.bookkeeping is self._books
        leaves.params = self._all if is_all else hold([*leaves.params, *parts])
        for i in positions:
            self.flags[i] = 1

    def square_norm(self, vector: int) -> Scalar:
        """‖g‖² of a vector that is held."""
        return self._add_up([s.backend.square_norm(s.leaves, s.grads[vector]) for s in self.all])

    def square_length(self, move: Perturbation, eta: list[float] | None) -> Scalar:
        """The square of the norm that a move is divided by."""
        minus = move.minus
        s = self.only
        if s is not None and self.on_host and not self.sharded:
            return float(
                s.backend.square_norm(s.leaves, s.grads[move.along], None if minus is None else s.grads[minus], eta)
            )
        return self._add_up(
            [
                s.backend.square_norm(s.leaves, s.grads[move.along], None if minus is None else s.grads[minus], eta)
                for s in self.all
            ]
        )

    def inner_products(
        self,
        terms: Sequence[tuple[ParameterBlock, list[TensorList]]],
        u: Sequence[PerGroup],
        m: Sequence[PerGroup] | None = None,
    ) -> Products:
        """The products of combinations of each block's terms: the coefficients ``u`` and ``m`` by term and group."""
        tables: list[Tensor] = []
        for block, own in terms:
            of_m = None if m is None else Direction(own, m)
            tables.append(block.backend.inner_products(block.leaves, Direction(own, u), of_m, len(self.groups)))
        if len(tables) == 1 and self.on_host and not self.sharded:
            found: Products = tables[0].tolist()
            return found
        return sums.inner_products(self._over_processes(tables), self.on_host)

    def _add_up(self, squares: list[Tensor]) -> Scalar:
        if len(squares) == 1 and self.on_host and not self.sharded:
            return float(squares[0])
        return sums.square_norm(self._over_processes(squares), self.on_host)

    def _over_processes(self, found: list[Tensor]) -> list[Tensor]:
        if not self.sharded:
            return found
        return add_up_over_processes(found, [block.layout for block in self.all])

    def allocate_backup(self, block: ParameterBlock) -> TensorList:
        """Memory for θ of a block."""
        if not self._spare:
            return block.backend.allocate(block.leaves.params)
        pairs = list(zip(block.owners, block.leaves.params, strict=True))
        fresh = iter(block.backend.allocate([part for owner, part in pairs if owner not in self._spare]))
        backup = [self._spare.pop(owner) if owner in self._spare else next(fresh) for owner, _ in pairs]
        return block.backend.bookkeeping.hold(backup)

    def drop(self, index: int) -> None:
        """Vector ``index`` is not needed any more."""
        for block in self.all:
            del block.grads[index]
        self.clear_gradients()

    def give_back(self, index: int) -> None:
        """Vector ``index`` is the gradient that the parameters have after all."""
        for block in self.all:
            for owner, grad in zip(block.owners, block.grads[index], strict=True):
                if owner.grad is None:  # one that is there is part of a buffer, with the same numbers
                    owner.grad = spread(grad, owner)

    def restore(self) -> None:
        """Put θ back, bit for bit."""
        for block in self.all:
            leaves = block.leaves
            count = len(leaves.params)
            if len(leaves.backup) > count:  # of an interrupted activate(), as the rest of the two lists
                leaves.backup = list(leaves.backup)[:count]
            del leaves.group[count:], block.owners[count:]
            block.backend.restore(leaves)

    def release(self, *, undone: bool) -> None:
        """Let go of all that is held."""
        block, self.only, self._whole = self.only, None, None
        self._blocks.clear()
        self.all.clear()
        self._spare.clear()
        self._books.let_go(self._all)
        self._select, self.named = None, ()
        self._parts = []
        if block is not None and block.leaves.params is self._all and not undone:
            block.grads.clear()
            leaves = block.leaves
            leaves.backup, leaves.saved, leaves.prepared, leaves.ticket = [], False, None, None
            self._whole = block

    def name(self, position: int) -> str:
        """Return the name of a parameter for messages."""
        group = self._group[position]
        param, place = self.params[position], position - self._group.index(group)
        names = self.groups[group].get("param_names")
        called = names[place] if names else next((name for name, p in self.named if p is param), "")
        called = f" ({called})" if called else ""
        shape = "not initialized yet" if is_lazy(param) else f"of shape {tuple(param.shape)}"
        return f"parameter {place} of group {group}{called}, {shape},"

    def _is_same_memory(self, position: int) -> bool:
        part, before = local(self.params[position]), self._parts[position]
        return part is before or part.data_ptr() == before.data_ptr()


def clear_weight_caches() -> None:
    """Forget what torch has computed from weights to use it again: autocast's casts, ``parametrize.cached()``.

    Where such a block is around the step, it would serve the weights of one pass to the next.
    """
    torch.clear_autocast_cache()
    cache = getattr(torch.nn.utils.parametrize, "_cache", None)
    if cache:
        cache.clear()


@torch.no_grad()
def materialise(block: ParameterBlock, direction: Direction) -> TensorList:
    """The direction as tensors, and θ restored; in the storage of a gradient the engine holds, if it holds one."""
    last = direction.terms[-1]
    plain = (
        len(direction.terms) == 1
        and direction.q is None
        and direction.limit is None
        and all(p == 1.0 for p in direction.p[0])
    )
    if plain:
        block.backend.restore(block.leaves)
        return last
    leaves = block.leaves
    out = direction.terms[0]
    if len(direction.terms) == 1:
        out = [torch.empty_like(part, dtype=leaves.vectors) for part in leaves.params]
    block.backend.direction(block.leaves, direction, out)
    return out
