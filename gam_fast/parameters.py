"""The parameters that take part in a step, in blocks, and the gradients held for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
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
    accumulate_dtype,
)
from .backends.eager import EagerBackend
from .distributed import Layout, add_up_over_processes, is_sharded, layout_of, local, local_gradient, spread
from .ownership import Kind, kind_of, wider_dtype

Select: TypeAlias = "Callable[[torch.device], Backend]"

_PARAMS_OF = operator.itemgetter("params")

PERTURB = "perturb"
"""The key in ``param_groups`` whose value ``False`` excludes the group from the perturbations."""

ADAPTIVE = "adaptive_radius"
"""The key whose value ``False`` makes T = 1 for the group's parameters in an adaptive recipe."""

_IS_PERTURBED = operator.methodcaller("get", PERTURB, True)
_IS_ADAPTIVE = operator.methodcaller("get", ADAPTIVE, True)

RECYCLE_BYTES = 1 << 16
"""From this size on, the memory of the previous step's last gradient serves for the backup."""

NEVER = 1 << 62
"""More bytes than any gradient has."""


@dataclass(eq=False, kw_only=True)
class ParameterBlock(Block):
    """The parameters of one device, dtype, layout and vector dtype, and the gradients held for them, by vector.

    If they are not dense in memory, or their vectors have another dtype, ``eager`` processes them. If not ``perturbed``
    (a group with ``perturb=False``) they are not in norms and have no backup. Without ``adaptive`` they have T = 1.
    """

    backend: Backend
    owners: TensorList = field(default_factory=list)
    """The user's parameters; ``params`` are the local part of each."""
    layout: Layout | None = None
    kind: Kind | None = None
    perturbed: bool = True
    adaptive: bool = True
    grads: dict[int, TensorList] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Kind | None, Layout | None, torch.dtype | None, bool, bool]:
        """The properties that the block's parameters share."""
        return self.kind, self.layout, self.vectors, self.perturbed, self.adaptive

    def pick(self, tensors: TensorList, chosen: Sequence[int]) -> TensorList:
        """Return the tensors of the chosen parameters."""
        return self.backend.bookkeeping.hold([tensors[i] for i in chosen])

    def part(self, chosen: Sequence[int], *, saved: bool) -> ParameterBlock:
        """Return a block of the chosen parameters, without gradients, and with their backup if ``saved``."""
        backup = self.pick(self.backup, chosen) if saved else []
        group, owners = [self.group[i] for i in chosen], [self.owners[i] for i in chosen]
        part = replace(self, params=self.pick(self.params, chosen), group=group, backup=backup, saved=saved)
        part.owners, part.grads, part.prepared, part.ticket = owners, {}, None, None
        return part


class StepParameters:
    """All parameters of a step; those that have had a gradient so far take part.

    ``recipe`` (its name) and ``named`` (the model's parameters) are for messages. With ``keep_parts``, gradients that
    are parts of other code's buffers stay in place.

    Attributes:
        on_host: whether a sum can be read without waiting for a device.
        sharded: whether any parameter is sharded over processes.
        flags: for each parameter, whether it takes part.
        all: the blocks.
        is_mixed: whether groups differ in ``perturb`` or ``adaptive_radius``.
        moved: the positions of parameters without a gradient that a pass has moved.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], select: Select, recipe: str, *, keep_parts: bool) -> None:
        self.params: TensorList = [param for group in groups for param in group["params"]]
        self.sharded = any(map(is_sharded, self.params))
        self._group = [g for g, group in enumerate(groups) for _ in group["params"]]
        self._counts = [len(group["params"]) for group in groups]
        self._perturbed: list[bool] = list(map(_IS_PERTURBED, groups))
        self._adaptive: list[bool] = list(map(_IS_ADAPTIVE, groups))
        self.is_mixed = len(set(self._perturbed)) > 1 or len(set(self._adaptive)) > 1
        self._whole: ParameterBlock | None = None  # the block of all parameters, if the previous step had one
        self._books: Bookkeeping = ownership
        if self.params and not self.sharded:
            self._books = select(self.params[0].device).bookkeeping
        self._all = self._books.hold(self.params)
        self._kinds = self._books.kinds(self._all)
        self._is_usual = not self.sharded and len(self._kinds) == 1 and self._kinds[0][2]
        self.devices = list(dict.fromkeys(device for device, _, _ in self._kinds))
        self.on_host = all(map(sums.reads_are_free, self.devices))
        if len(self.devices) > 1:  # perhaps with several backends
            self._books, self._all = ownership, self.params
        self._start(groups, select, recipe, keep_parts)

    def _start(self, groups: Sequence[dict[str, Any]], select: Select, recipe: str, keep_parts: bool) -> None:
        # rebuilt, because a Ctrl-C may have interrupted release()
        self.all: list[ParameterBlock] = []
        self._spare: dict[Tensor, Tensor] = {}
        self.groups = groups
        self._select: Select | None = select  # only during the step, because it references the optimizer
        self._recipe = recipe
        self._keep_parts = keep_parts and not self.sharded
        self.flags = bytearray(len(self.params))
        self.named: Iterable[tuple[str, Tensor]] = ()
        self._versions: Versions | None = None
        self._each: list[int] | None = None  # versions by parameter, if parameters that are not trained may move
        self._parts: TensorList = []  # local parts of sharded parameters when the versions were recorded
        self.moved: list[int] = []

    def again(
        self, groups: Sequence[dict[str, Any]], select: Select, recipe: str, *, keep_parts: bool
    ) -> StepParameters | None:
        """Return this object for another step if its parameters are the same and of the same kinds; else ``None``."""
        lists = list(map(_PARAMS_OF, groups))
        same = self._counts == list(map(len, lists)) and self._perturbed == list(map(_IS_PERTURBED, groups))
        same = same and self._adaptive == list(map(_IS_ADAPTIVE, groups))
        if self.sharded or not same or not all(map(operator.is_, chain(*lists), self.params)):
            return None
        self._all = self._books.hold(self.params, self._all)
        if self._books.kinds(self._all) != self._kinds:
            self._books.let_go(self._all)
            return None
        self._start(groups, select, recipe, keep_parts)
        return self

    def clear_gradients(self) -> None:
        """Clear all gradients; those that are parts of other code's buffers are zeroed."""
        self._books.clear_gradients(self._all, NEVER, self._keep_parts)

    def begin_pass(self, *, recycle: bool, each: bool) -> None:
        """Clear gradients. From here on, nobody but the engine may write to a parameter that is being trained.

        Args:
            recycle: whether to keep large gradients on a CPU as memory for the backup.
            each: whether parameters that are not trained may move; one that moved then does not end the search.
        """
        least = RECYCLE_BYTES if recycle and not self.all and not self.sharded else NEVER
        for i, grad in self._books.clear_gradients(self._all, least, self._keep_parts):
            if self._perturbed[self._group[i]]:
                self._spare[self.params[i]] = grad
        self._parts = list(map(local, self.params)) if self.sharded else []
        self._versions = self._books.versions(self._parts or self._all)
        self._each = [param._version for param in self._parts or self.params] if each else None

    def _check_versions(self, where: str) -> None:
        now = self._parts or self.params
        first = -1 if self._versions is None else self._versions.first_changed(self._parts or self._all)
        if first < 0:
            return
        changed: Sequence[int] = [first]
        if self._each is not None:
            changed = [i for i, version in enumerate(self._each) if now[i]._version != version]
        elif self.params[first].grad is None and not self.flags[first]:
            # several may have moved: all that have no gradient and were not trained before count as moved
            changed = [i for i, param in enumerate(self.params) if param.grad is None and not self.flags[i]]
        for i in changed:
            # fully_shard replaces the local part in the first forward
            if self.sharded and local(self.params[i]).data_ptr() != now[i].data_ptr():
                continue
            if self.params[i].grad is not None or self.flags[i]:
                self.refuse_write(i, where)
            self.moved.append(i)

    def refuse_write(self, position: int, where: str) -> NoReturn:
        """Raise the RuntimeError for a trained parameter that was written to."""
        raise RuntimeError(
            f"{self._name(position)} was modified during {where}; parameters must stay as the optimizer set them "
            f"until the step is over, because {self._recipe} evaluates the model at several points. Embedding(max_norm="
            "), an initialisation by the first batch, the first forward of a lazy module and clamping weights in the "
            "forward do that: run such an initialisation once before training, and renormalise or clamp after the "
            "step. (A parameter without a gradient may be moved.)"
        )

    def take_all(self, index: int, *, keep: bool) -> bool:
        """Take the fast path of :meth:`take_in`. Return False if it does not apply."""
        block = self.all[0] if self.all else self._whole
        if self._versions is None or not self._is_usual or self.is_mixed:
            return False
        if block is not None and block.params is not self._all:
            return False
        taken = self._books.take_all_gradients(self._all, self._versions, self.flags, keep)
        if taken is None:
            return False
        if block is None:
            self.activate(range(len(self.params)))
            block = self.all[0]
        elif not self.all:
            self.flags[:] = b"\1" * len(self.flags)
            self.all.append(block)
        block.grads[index] = taken
        return True

    def take_in(self, index: int, *, keep: bool, where: str, mend: str | None, may_write: bool, put_back: bool) -> None:
        """Take ``param.grad`` in as vector ``index``, as the optimizer's own if it is to be kept.

        Parameters with their first gradient take part from now on.

        Args:
            index: the index of the vector.
            keep: whether the engine keeps the gradient and may overwrite it.
            where: the name of the pass, for messages.
            mend: the remedy to name if no parameter has a gradient; ``None`` allows that.
            may_write: whether the forward may have written to parameters, as in a step of one pass at θ.
            put_back: whether parameters were moved before they had a gradient, and go back if they have none.

        Raises:
            RuntimeError: a parameter was written to since :meth:`begin_pass`; or no parameter has a gradient, and
                ``mend`` is given.
            TypeError: a sparse gradient.
        """
        if not may_write:
            self._check_versions(where)
        if put_back:
            self._put_back_unused()
        unflagged, any_gradient, sparse = self._books.survey_gradients(self._all, self.flags)
        if sparse >= 0:
            layout = getattr(self.params[sparse].grad, "layout", None)
            raise TypeError(
                f"{self._name(sparse)} has a gradient of layout {layout}; {self._recipe} needs dense gradients: "
                "construct the module with sparse=False"
            )
        if unflagged:
            self.activate(unflagged)
        if not any_gradient and mend is not None:
            raise RuntimeError(f"{where} ended without a gradient for any parameter: {mend}")
        for block in self.all:
            if self.sharded or block.vectors is not None:
                block.grads[index] = ownership.take_gradients(block.owners, keep, block.vectors)
            else:
                block.grads[index] = block.backend.bookkeeping.take_gradients(block.params, keep)

    def activate(self, positions: Sequence[int]) -> None:
        """Let parameters take part from now on; their gradients in earlier passes count as zero."""
        if self._whole is not None and not self.all and len(positions) == len(self.params):
            self.flags[:] = b"\1" * len(self.flags)
            self.all.append(self._whole)
            return
        places: dict[tuple[Kind, Layout | None, torch.dtype | None, bool, bool], list[int]] = {}
        for i in positions:
            param = self.params[i]
            kind = self._kinds[0] if self._is_usual else kind_of(local(param))
            layout, wider = (layout_of(param), None) if self.sharded else (None, wider_dtype(param))
            g = self._group[i]
            places.setdefault((kind, layout, wider, self._perturbed[g], self._adaptive[g]), []).append(i)
        for key, chosen in places.items():
            kind, layout, wider, perturbed, adaptive = key
            block = next((b for b in self.all if b.key == key), None)
            if block is None:
                assert self._select is not None
                backend = self._select(kind[0]) if wider is None and kind[2] else EagerBackend()
                block = ParameterBlock(
                    backend=backend, vectors=wider, layout=layout, kind=kind, perturbed=perturbed, adaptive=adaptive
                )
                block.grads = {index: [] for index in self.all[0].grads} if self.all else {}
                self.all.append(block)
            self._add(block, chosen)

    def movable(self) -> list[int]:
        """Return the positions of the parameters that are trained and perturbed."""
        pairs = zip(self.params, self._group, strict=True)
        return [i for i, (p, g) in enumerate(pairs) if p.requires_grad and self._perturbed[g] and not is_lazy(p)]

    def _put_back_unused(self) -> None:
        """Restore parameters that were moved before the only pass but have no gradient; they take no part."""
        position = {param: i for i, param in enumerate(self.params)}
        for block in list(self.all):
            chosen = [i for i, owner in enumerate(block.owners) if owner.grad is not None]
            if len(chosen) == len(block.owners):
                continue
            block.backend.restore(block)
            for owner in block.owners:
                self.flags[position[owner]] = owner.grad is not None
            at = self.all.index(block)
            self.all[at : at + 1] = [block.part(chosen, saved=False)] if chosen else []

    def _add(self, block: ParameterBlock, positions: Sequence[int]) -> None:
        """Add parameters to a block. A signal may interrupt anywhere; restore() relies on the last assignment."""
        owners = [self.params[i] for i in positions]
        parts = [local(param) for param in owners] if self.sharded else owners
        hold = block.backend.bookkeeping.hold
        block.prepared = None
        if block.saved:
            copies = [part.clone(memory_format=torch.preserve_format) for part in parts]
            block.backup = hold([*block.backup, *copies])
        for index, grads in block.grads.items():
            block.grads[index] = hold([*grads, *(torch.zeros_like(part, dtype=block.vectors) for part in parts)])
        block.group.extend([self._group[i] for i in positions])
        block.owners.extend(owners)
        is_all = len(positions) == len(self.params) and not self.sharded and block.backend.bookkeeping is self._books
        block.params = self._all if is_all else hold([*block.params, *parts])
        for i in positions:
            self.flags[i] = 1

    def square_norm(
        self, vector: int, minus: int | None = None, eta: PerGroup | None = None, *, whole: bool = False
    ) -> Scalar:
        """Return ‖T (g − g[minus])‖² of held vectors over the perturbed parameters; with ``whole``, over all.

        See :meth:`Backend.square_norm`.
        """
        is_over_all = whole or not self.is_mixed
        squares, blocks = [], self.all if is_over_all else [block for block in self.all if block.perturbed]
        for block in blocks:
            b = None if minus is None else block.grads[minus]
            squares.append(block.backend.square_norm(block, block.grads[vector], b, eta if block.adaptive else None))
        if len(squares) == 1 and self.on_host and not self.sharded:
            return float(squares[0])
        if not squares:  # no perturbed parameter has a gradient
            return 0.0 if self.on_host else self._zeros()
        total = sums.add_up(self._over_processes(squares, blocks))
        return float(total) if self.on_host else total

    def square_norms(self, vector: int, minus: int | None = None) -> Tensor:
        """Return ‖g − g[minus]‖² by group, over what is perturbed, as a tensor; 0 for groups without such."""
        names = (vector,) if minus is None else (vector, minus)
        terms = [(block, [block.grads[k] for k in names]) for block in self.all if block.perturbed]
        if not terms:
            return self._zeros(len(self.groups))
        found = self.inner_products(terms, [[sign] * len(self.groups) for sign in (1.0, -1.0)[: len(names)]])
        table = found if isinstance(found, Tensor) else torch.tensor(found, dtype=torch.float64)
        return table[:, 0].contiguous()

    def _zeros(self, *sizes: int) -> Tensor:
        """Return sums of nothing."""
        device = self.devices[0]
        return torch.zeros(sizes, dtype=accumulate_dtype(device), device=device)

    def inner_products(
        self,
        terms: Sequence[tuple[ParameterBlock, list[TensorList]]],
        u: Sequence[PerGroup],
        m: Sequence[PerGroup] | None = None,
    ) -> Products:
        """Return the products of u and m, the combinations of each block's terms by coefficients per term and group."""
        tables: list[Tensor] = []
        for block, own in terms:
            of_m = None if m is None else Direction(own, m)
            tables.append(block.backend.inner_products(block, Direction(own, u), of_m, len(self.groups)))
        if len(tables) == 1 and self.on_host and not self.sharded:
            found: Products = tables[0].tolist()
            return found
        total = sums.add_up(self._over_processes(tables, [block for block, _ in terms]))
        return total.tolist() if self.on_host else total

    def _over_processes(self, found: list[Tensor], blocks: Sequence[ParameterBlock]) -> list[Tensor]:
        return add_up_over_processes(found, [block.layout for block in blocks]) if self.sharded else found

    def allocate_backup(self, block: ParameterBlock) -> TensorList:
        """Return memory for the backup of a block, recycled where possible."""
        if not self._spare:
            return block.backend.allocate(block.params)
        pairs = list(zip(block.owners, block.params, strict=True))
        fresh = iter(block.backend.allocate([part for owner, part in pairs if owner not in self._spare]))
        backup = [self._spare.pop(owner) if owner in self._spare else next(fresh) for owner, _ in pairs]
        return block.backend.bookkeeping.hold(backup)

    def drop(self, index: int) -> None:
        """Drop vector ``index``, which is no longer needed."""
        for block in self.all:
            del block.grads[index]
        self.clear_gradients()

    def give_back(self, index: int) -> None:
        """Give vector ``index`` back to the parameters as their gradient."""
        for block in self.all:
            for owner, grad in zip(block.owners, block.grads[index], strict=True):
                if owner.grad is None:  # a present gradient is part of a buffer and has the same values
                    owner.grad = spread(grad, owner)

    def restore(self) -> None:
        """Put θ back, bit for bit."""
        for block in self.all:
            count = len(block.params)
            if len(block.backup) > count:  # activate() was interrupted
                block.backup = list(block.backup)[:count]
            del block.group[count:], block.owners[count:]
            block.backend.restore(block)

    def release(self, *, undone: bool) -> None:
        """Release everything that is held for the step."""
        block, self._whole = self.all[0] if self.all else None, None
        self.all.clear()
        self._spare.clear()
        self._books.let_go(self._all)
        self._select, self.named = None, ()
        self._parts = []
        if block is not None and block.params is self._all and not undone:
            block.grads.clear()
            block.backup, block.saved, block.prepared, block.ticket = [], False, None, None
            self._whole = block

    def _name(self, position: int) -> str:
        """Return the name of a parameter for messages."""
        group = self._group[position]
        param, place = self.params[position], position - self._group.index(group)
        names = self.groups[group].get("param_names")
        called = names[place] if names else next((name for name, p in self.named if p is param), "")
        called = f" ({called})" if called else ""
        shape = "not initialized yet" if is_lazy(param) else f"of shape {tuple(param.shape)}"
        return f"parameter {place} of group {group}{called}, {shape},"


def clear_weight_caches() -> None:
    """Clear torch's caches of values computed from weights: autocast's casts, ``parametrize.cached()``.

    If such a block encloses the step, its cache would carry the weights of one pass to the next.
    """
    torch.clear_autocast_cache()
    cache = getattr(torch.nn.utils.parametrize, "_cache", None)
    if cache:
        cache.clear()


def _has_memory_of(tensor: Tensor, param: Tensor) -> bool:
    """Return whether the tensor is in the memory of ``param.grad``, which the user sees."""
    return tensor.data_ptr() == local_gradient(param).data_ptr()


@torch.no_grad()
def materialise(block: ParameterBlock, direction: Direction) -> TensorList:
    """Restore θ and return the direction as tensors, stored in a held gradient's memory if there is one."""
    out = direction.terms[0]
    plain = direction.q is None and direction.limit is None and all(p == 1.0 for p in direction.p[0])
    if len(direction.terms) == 1 and plain:
        block.backend.restore(block)
        return out
    pairs = zip(block.owners, out, strict=True)
    if len(direction.terms) == 1 or any(p.grad is not None and _has_memory_of(x, p) for p, x in pairs):
        out = [torch.empty_like(part, dtype=block.vectors) for part in block.params]
    block.backend.direction(block, direction, out)
    return out
