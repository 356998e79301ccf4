"""The backend that runs wherever torch runs: chunks of tensors through ``torch._foreach_*``.

It is the readable definition of the primitives. Each chunk is processed in scratch memory of a fixed size, in fp32
(fp64 for float64), and rounded when it is stored. So the intermediates of low-precision parameters are not rounded,
and no parameter-sized temporary is allocated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .. import ownership
from . import scalars
from .base import Block, Bookkeeping, Direction, FoldInto, PerGroup, Scalar, TensorList, accumulate_dtype

CPU_CHUNK = 1 << 20
"""Elements per chunk on a CPU. With fewer, waking the threads for each operation costs more than the cache saves."""

DEVICE_CHUNK = 1 << 24
"""Elements per chunk on an accelerator: large, for few launches."""

NORM_PART = 1 << 16
"""Elements of a norm that a CPU sums in fp32. The error grows with their number: 4e-7 here, 1e-5 at 2²⁰."""

ROW = 1024
"""Elements of a product that are summed in the working precision. The row sums are added in fp64."""


@dataclass(frozen=True)
class Piece:
    """A part of one leaf: the result of narrowing it by each ``(dim, start, length)`` in ``cuts``."""

    leaf: int
    cuts: tuple[tuple[int, int, int], ...]

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return this part of its leaf in ``tensors``, as a view."""
        tensor = tensors[self.leaf]
        assert tensor is not None
        for dim, start, length in self.cuts:
            tensor = tensor.narrow(dim, start, length)
        return tensor


class Arena:
    """Scratch memory that the chunks of a step reuse, so that it is allocated and paged in once."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._used = 0

    def reset(self) -> None:
        """Release all blocks before the next chunk."""
        self._used = 0

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised block, distinct from all blocks taken since :meth:`reset`."""
        if self._used == len(self._blocks):
            self._blocks.append(torch.empty(0, dtype=dtype, device=device))
        block = self._blocks[self._used]
        if block.numel() < numel or block.dtype != dtype:
            block = self._blocks[self._used] = torch.empty(numel, dtype=dtype, device=device)
        self._used += 1
        return block[:numel]


class Chunk:
    """Pieces of leaves of one dtype and one group, and the scratch memory for working on them."""

    def __init__(self, pieces: list[Piece], group: int, leaves: Block, arena: Arena) -> None:
        self.pieces = pieces
        self.arena = arena
        self.group = group
        params = leaves.params
        like = params[pieces[0].leaf]
        self.device = like.device
        self.dtype = like.dtype
        self.opmath = torch.float64 if torch.float64 in (like.dtype, leaves.vectors) else torch.float32
        self.sizes = [piece.of(params).size() for piece in pieces]
        self.numel = sum(size.numel() for size in self.sizes)

    def __call__(self, tensors: Sequence[Tensor | None]) -> TensorList:
        """Return the pieces of ``tensors`` that belong to this chunk, as views."""
        return [piece.of(tensors) for piece in self.pieces]

    def scratch(self) -> tuple[Tensor, TensorList]:
        """Return uninitialised one-dimensional memory of whole rows, its padding zero, and one view of it per piece."""
        padded = -(-self.numel // ROW) * ROW
        flat = self.arena.take(padded, self.opmath, self.device)
        flat[self.numel :].zero_()
        parts = flat[: self.numel].split([size.numel() for size in self.sizes])
        return flat, [part.view(size) for part, size in zip(parts, self.sizes, strict=True)]

    def copy(self, tensors: Sequence[Tensor | None]) -> TensorList:
        """Copy the chunk of ``tensors`` to scratch memory and return it."""
        return self.own(self(tensors))

    def own(self, values: TensorList) -> TensorList:
        """Return ``values`` of this chunk in scratch memory."""
        out = self.scratch()[1]
        torch._foreach_copy_(out, values)
        return out

    def difference(self, a: TensorList, b: TensorList | None) -> TensorList:
        """Return the chunk of ``a − b``, or of ``a``, in the working precision. Do not write to it."""
        if b is None and self.dtype == self.opmath:
            return self(a)
        out = self.copy(a)
        if b is not None:
            torch._foreach_sub_(out, self(b))
        return out

    def open(self, tensors: Sequence[Tensor | None]) -> TensorList:
        """Return the chunk of ``tensors`` to change in place: views if their dtype is precise enough, else scratch."""
        return self(tensors) if self.dtype == self.opmath else self.copy(tensors)

    def close(self, tensors: Sequence[Tensor | None], work: TensorList) -> None:
        """Store ``work``, a result of :meth:`open`, in ``tensors``."""
        if self.dtype != self.opmath:
            torch._foreach_copy_(self(tensors), work)


def _cuts(size: Sequence[int], dims: Sequence[int], limit: int) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """Cut an array along ``dims``, the slowest in memory first, into parts of at most ``limit`` elements."""
    numel = math.prod(size)
    if numel <= limit:
        yield ()
        return
    dim, *rest = dims
    inner = numel // size[dim]
    length = max(1, limit // inner)
    within = [1 if d == dim else n for d, n in enumerate(size)]
    for start in range(0, size[dim], length):
        for cuts in _cuts(within, rest, limit) if inner > limit else [()]:
            yield ((dim, start, min(length, size[dim] - start)), *cuts)


def chunks(leaves: Block) -> list[Chunk]:
    """Divide the leaves into chunks of one dtype and group each, of equal size if the tensors allow it.

    >>> leaves = Block([torch.zeros(600, 4000), torch.zeros(3)], group=[0, 0])
    >>> [chunk.numel for chunk in chunks(leaves)]
    [1048000, 1048000, 304003]
    """
    if leaves.prepared is not None:
        made: list[Chunk] = leaves.prepared
        return made
    limit = CPU_CHUNK if leaves.params[0].device.type == "cpu" else DEVICE_CHUNK
    buckets: dict[tuple[int, torch.dtype], list[Piece]] = {}
    for index, (param, group) in enumerate(zip(leaves.params, leaves.group, strict=True)):
        if param.numel():
            dims = sorted(range(param.dim()), key=param.stride, reverse=True)
            pieces = [Piece(index, cuts) for cuts in _cuts(param.size(), dims, limit)]
            buckets.setdefault((group, param.dtype), []).extend(pieces)
    result: list[Chunk] = []
    arena = Arena()
    for (group, _), pieces in buckets.items():
        fill: list[Piece] = []
        room = limit
        for piece in pieces:
            numel = piece.of(leaves.params).numel()
            if fill and numel > room:
                result.append(Chunk(fill, group, leaves, arena))
                fill, room = [], limit
            fill.append(piece)
            room -= numel
        result.append(Chunk(fill, group, leaves, arena))
    leaves.prepared = result
    return result


def _each(leaves: Block) -> Iterator[Chunk]:
    """Yield the chunks one by one; all use the same scratch memory."""
    for chunk in chunks(leaves):
        chunk.arena.reset()
        yield chunk


def _add(chunk: Chunk, out: TensorList, terms: TensorList, factor: Scalar) -> None:
    """Compute ``out ← out + factor · terms`` in the dtype of ``out``."""
    if isinstance(factor, Tensor):
        product = chunk.scratch()[1]
        torch._foreach_copy_(product, terms)
        torch._foreach_mul_(product, factor.to(chunk.opmath))
        torch._foreach_add_(out, product)
    else:
        torch._foreach_add_(out, terms, alpha=factor)


Factors: TypeAlias = "Sequence[Sequence[Scalar]]"  # by term, by group


def _combine(chunk: Chunk, terms: Sequence[TensorList], factors: Factors, own: bool = True) -> TensorList:
    """Return ``Σ factor · term`` of a chunk in scratch memory; without ``own`` read-only, and maybe a term itself."""
    pairs = [(row[chunk.group], term) for row, term in zip(factors, terms, strict=True)]
    used = [(factor, term) for factor, term in pairs if isinstance(factor, Tensor) or factor != 0.0] or pairs[:1]
    (factor, term), *rest = used
    if not own and not rest and not isinstance(factor, Tensor) and factor == 1.0:
        return chunk.difference(term, None)
    out = chunk.copy(term)
    if isinstance(factor, Tensor):
        torch._foreach_mul_(out, factor.to(chunk.opmath))
    elif factor != 1.0:
        torch._foreach_mul_(out, factor)
    for factor, term in rest:
        _add(chunk, out, chunk(term), factor)
    return out


def _multiply_weights(chunk: Chunk, out: TensorList, leaves: Block, eta: PerGroup, power: int) -> None:
    """Compute ``out ← T^power out`` with T = |θ| + eta."""
    weights = chunk.copy(leaves.backup if leaves.saved else leaves.params)
    torch._foreach_abs_(weights)
    torch._foreach_add_(weights, eta[chunk.group])
    for _ in range(power):
        torch._foreach_mul_(out, weights)


def _sum(partial: list[Tensor], device: torch.device) -> Tensor:
    """Sum fp64 vectors in an order that does not depend on the number of threads: one thread sums each tree row."""
    dtype = accumulate_dtype(device)
    if not partial:
        return torch.zeros((), dtype=dtype, device=device)
    values = torch.cat(partial).to(dtype)
    while values.numel() > ROW:
        rows = -(-values.numel() // ROW)
        values = torch.nn.functional.pad(values, (0, rows * ROW - values.numel())).view(rows, ROW).sum(1)
    return values.sum()


def _square_norms(values: TensorList) -> Tensor:
    """Return squared norms of ``values`` as an fp64 vector; on a CPU, of parts short enough for fp32 sums."""
    if values[0].device.type == "cpu":
        values = [part for value in values for part in _flat_parts(value)]
    norms = torch.stack(list(torch._foreach_norm(values)))
    return norms.to(accumulate_dtype(norms.device)).square_()


def _flat_parts(value: Tensor) -> Sequence[Tensor]:
    """Split ``value`` into parts of ``NORM_PART`` elements if it has no gaps in memory."""
    if value.numel() <= NORM_PART:
        return (value,)
    in_memory_order = value.permute(sorted(range(value.dim()), key=value.stride, reverse=True))
    return in_memory_order.view(-1).split(NORM_PART) if in_memory_order.is_contiguous() else (value,)


def copy_bits(target: TensorList, source: TensorList) -> None:
    """Copy bit for bit; on a GPU, torch itself copies 16-bit numbers through fp32, which alters a NaN."""
    if target and target[0].is_cuda:
        target, source = [_as_integers(tensor) for tensor in target], [_as_integers(tensor) for tensor in source]
    torch._foreach_copy_(list(target), list(source))  # of a list of the core too


def _as_integers(tensor: Tensor) -> Tensor:
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return tensor.view(torch.int16) if plain and tensor.dtype.itemsize == 2 else tensor


class EagerBackend:
    """Reference implementation of :class:`gam_fast.backends.base.Backend`, which documents the primitives."""

    name = "eager"
    bookkeeping: Bookkeeping = ownership

    @staticmethod
    def describe() -> str:
        return "torch._foreach_* operations, on any device"

    @staticmethod
    def refusal(device: torch.device) -> str | None:
        return None

    def allocate(self, like: TensorList) -> TensorList:
        return [torch.empty_like(tensor) for tensor in like]

    def square_norm(
        self, leaves: Block, a: TensorList, b: TensorList | None = None, eta: PerGroup | None = None
    ) -> Tensor:
        partial = []
        for chunk in _each(leaves):
            values = chunk.difference(a, b)
            if eta is not None:
                values = chunk.own(values)
                _multiply_weights(chunk, values, leaves, eta, power=1)
            partial.append(_square_norms(values))
        return _sum(partial, leaves.params[0].device)

    def perturb(
        self,
        leaves: Block,
        a: TensorList,
        b: TensorList | None,
        radius: PerGroup,
        square: Scalar,
        *,
        from_start: bool,
        eta: PerGroup | None = None,
        fold: FoldInto | None = None,
        multiple: PerGroup | None = None,
    ) -> None:
        if not leaves.saved:
            copy_bits(leaves.backup, leaves.params)
            leaves.saved = True
        elif from_start:
            copy_bits(leaves.params, leaves.backup)
        factor = scalars.steps(radius, square, multiple)
        for chunk in _each(leaves):
            step = chunk.difference(a, b)
            if eta is not None:
                step = chunk.own(step)
                _multiply_weights(chunk, step, leaves, eta, power=2)
            params = chunk.open(leaves.params)
            _add(chunk, params, step, factor[chunk.group])
            chunk.close(leaves.params, params)
            if fold is not None:
                into = chunk.open(fold.into)
                torch._foreach_mul_(into, fold.k[chunk.group])
                torch._foreach_add_(into, chunk(fold.other), alpha=fold.l[chunk.group])
                chunk.close(fold.into, into)

    def inner_products(self, leaves: Block, u: Direction, m: Direction | None, groups: int) -> Tensor:
        device = leaves.params[0].device
        dtype = accumulate_dtype(device)
        partial: list[list[list[Tensor]]] = [[[], [], []] for _ in range(groups)]
        for chunk in _each(leaves):
            uu, um, mm = partial[chunk.group]
            u_values = _combine(chunk, u.terms, u.p, own=False)
            uu.append(_square_norms(u_values))
            if m is not None:
                flat, product = chunk.scratch()
                m_values = _combine(chunk, m.terms, m.p, own=False)
                mm.append(_square_norms(m_values))
                torch._foreach_copy_(product, m_values)
                torch._foreach_mul_(product, u_values)
                um.append(flat.view(-1, ROW).sum(1).to(dtype))
        sums = [_sum(column, device) for column in itertools.chain.from_iterable(partial)]
        return torch.stack(sums).view(groups, 3)

    def restore(self, leaves: Block) -> None:
        if leaves.saved:
            copy_bits(leaves.params, leaves.backup)

    def direction(self, leaves: Block, d: Direction, out: TensorList) -> None:
        factors = scalars.factors(d)
        for chunk in _each(leaves):
            torch._foreach_copy_(chunk(out), _combine(chunk, d.terms, factors))
        self.restore(leaves)

    def takes_state(self, leaves: Block, state: Sequence[Sequence[Tensor | None]]) -> bool:
        return True

    def update(
        self,
        leaves: Block,
        d: Direction,
        formula: str,
        state: Sequence[Sequence[Tensor | None]],
        groups: Sequence[Sequence[float]],
        options: Sequence[Sequence[float]],
        option: Sequence[int],
    ) -> None:
        self.restore(leaves)
        factors = scalars.factors(d)
        for chunk in _each(leaves):
            of_leaf = [options[option[piece.leaf]] for piece in chunk.pieces]
            # all leaves of a group have the same states
            used = [values for values in state if values[chunk.pieces[0].leaf] is not None]
            step = _combine(chunk, d.terms, factors)
            params, *work = (chunk.open(values) for values in (leaves.params, *used))
            _FORMULAS[formula](step, params, work, groups[chunk.group], of_leaf)
            for values, opened in zip((leaves.params, *used), (params, *work), strict=True):
                chunk.close(values, opened)


# Base optimizer steps on the tensors of a chunk, as in csrc/math.h. They may overwrite d.


def _decay(d: TensorList, theta: TensorList, decay: float, shrink: float, maximize: float) -> None:
    if maximize:
        torch._foreach_neg_(d)
    if decay != 0.0:
        torch._foreach_add_(d, theta, alpha=decay)
    if shrink != 1.0:
        torch._foreach_mul_(theta, shrink)


def _sgd(d: TensorList, theta: TensorList, state: list[TensorList], h: Sequence[float], of_leaf: OfLeaf) -> None:
    lr, momentum, dampening, decay, nesterov, maximize = h
    _decay(d, theta, decay, 1.0, maximize)
    if state:
        (buffer,) = state
        torch._foreach_mul_(buffer, momentum)
        for first in (0.0, 1.0):
            chosen = [(b, x) for b, x, option in zip(buffer, d, of_leaf, strict=True) if option[0] == first]
            if chosen:
                alpha = 1.0 if first else 1.0 - dampening
                torch._foreach_add_([b for b, _ in chosen], [x for _, x in chosen], alpha=alpha)
        if nesterov:
            torch._foreach_add_(d, buffer, alpha=momentum)
        else:
            d = buffer
    torch._foreach_add_(theta, d, alpha=-lr)


def _adam(d: TensorList, theta: TensorList, state: list[TensorList], h: Sequence[float], of_leaf: OfLeaf) -> None:
    beta1, beta2, eps, *decay = h
    average, square, *largest = state
    _decay(d, theta, *decay)
    torch._foreach_lerp_(average, d, 1.0 - beta1)
    torch._foreach_mul_(square, beta2)
    torch._foreach_addcmul_(square, d, d, 1.0 - beta2)
    if largest:
        torch._foreach_maximum_(largest[0], square)
    denominator = torch._foreach_sqrt(largest[0] if largest else square)
    torch._foreach_div_(denominator, [root_correction for _, root_correction in of_leaf])
    torch._foreach_add_(denominator, eps)
    torch._foreach_addcdiv_(theta, average, denominator, [-step_size for step_size, _ in of_leaf])


def _lion(d: TensorList, theta: TensorList, state: list[TensorList], h: Sequence[float], of_leaf: OfLeaf) -> None:
    lr, beta1, beta2, *decay = h
    (average,) = state
    _decay(d, theta, *decay)
    update = torch._foreach_lerp(average, d, 1.0 - beta1)
    torch._foreach_sign_(update)
    torch._foreach_lerp_(average, d, 1.0 - beta2)
    torch._foreach_add_(theta, update, alpha=-lr)


OfLeaf: TypeAlias = "Sequence[Sequence[float]]"
_FORMULAS = {"sgd": _sgd, "adam": _adam, "lion": _lion}
