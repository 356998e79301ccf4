"""The lists of tensors of one launch as kernels take them: checked, and their addresses in the memory of the device.

For kernels that are launched from Python; the compiled core does the same in C++ (``csrc/call.cpp``,
``csrc/cuda/tables.cpp``). What a table holds is described in ``kernels/table.py``.

A table is made and copied to the device, asynchronously, when the tensors are others than in the step before, and
numbers when they have changed (Adam's corrections do in each step): one copy a launch at most, and mostly none. While a
CUDA graph is captured each launch has a copy of its own, from memory that is kept for good, because the graph repeats
it.
"""

from __future__ import annotations

import math
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..kernels import table
from ..kernels.table import CHUNK, HEADER
from ..ownership import is_dense
from .base import Block

KEPT = 32
"""Tables that are kept. A step has about eight; the memory of gradients may alternate between a few places."""

DTYPES: dict[torch.dtype, str] = {getattr(torch, name): name for name in table.DTYPES}
"""Dtypes that kernels take, by their names."""

_ABSENT = torch.empty(0, dtype=torch.float32, device="cpu")  # its address is 0

Value = TypeVar("Value")


@dataclass(frozen=True)
class Argument:
    """One list of a launch, or ``None`` where it has none; some leaves may have no tensor in it.

    Attributes:
        name: what errors call it.
        tensors: aligned with the leaves.
        written: whether the launch writes to it.
    """

    name: str
    tensors: Sequence[Tensor | None] | None
    written: bool = False


@dataclass(frozen=True)
class Prepared:
    """What a launch gets: one program a piece; of ``starts``, where the pieces of each group begin, and the end.

    ``warp`` is the number of threads in a warp of the device, ``width`` that of words in a row of the table.
    """

    programs: int
    warp: int
    pieces: Tensor
    starts: Tensor
    whole: Tensor
    table: Tensor
    width: int
    dtype: str
    numbers: list[Tensor]


class Tables:
    """The tables of one set of leaves, which keep their shapes, strides, dtype and groups."""

    def __init__(self, leaves: Block) -> None:
        self.device = leaves.params[0].device
        self.group = list(leaves.group)
        if min(self.group) < 0:
            raise ValueError(f"group must be indices of parameter groups, got {min(self.group)}")
        self.groups = max(self.group) + 1
        self.dtype = leaves.params[0].dtype
        self.sizes = [param.size() for param in leaves.params]
        self.strides = [param.stride() for param in leaves.params]
        if any(param.dtype != self.dtype for param in leaves.params):
            found = ", ".join(map(str, dict.fromkeys(param.dtype for param in leaves.params)))
            raise TypeError(f"parameters must be of one dtype, got {found}")
        if self.dtype not in DTYPES:
            raise TypeError(f"parameters must be of dtype float64, float32, bfloat16 or float16, got {self.dtype}")
        for i, param in enumerate(leaves.params):
            if not is_dense(param.size(), param.stride()):
                raise ValueError(f"params[{i}] must be dense in memory, got {tuple(param.size())} by {param.stride()}")
        pieces, starts = self._pieces()
        self.programs = len(pieces) // 3
        self._fixed = torch.tensor([*pieces, *starts, 0, self.programs], dtype=torch.int64, device="cpu")
        self._rows: LRUCache[Tensor] = LRUCache(KEPT)
        self._copies: dict[int, LRUCache[Tensor]] = {}  # by stream
        self._pieces_for_graphs: Tensor | None = None
        self.warp = 32
        if self.device.type == "cuda":
            self.warp = getattr(torch.cuda.get_device_properties(self.device), "warp_size", 32)

    def fits(self, leaves: Block) -> bool:
        """Return whether these are leaves of the same shapes, strides, dtype, groups and device."""
        return (
            self.group == leaves.group
            and self.sizes == [param.size() for param in leaves.params]
            and self.strides == [param.stride() for param in leaves.params]
            and all(param.device == self.device and param.dtype == self.dtype for param in leaves.params)
        )

    def _pieces(self) -> tuple[list[int], list[int]]:
        """Return leaf, first element and length of each piece, group by group, and where each group begins."""
        leaves_of: list[list[int]] = [[] for _ in range(self.groups)]
        for leaf, group in enumerate(self.group):
            leaves_of[group].append(leaf)
        pieces: list[int] = []
        starts = []
        for leaves in leaves_of:
            starts.append(len(pieces) // 3)
            for leaf in leaves:
                numel = math.prod(self.sizes[leaf])
                for begin in range(0, numel, CHUNK):
                    pieces += (leaf, begin, min(CHUNK, numel - begin))
        return pieces, [*starts, len(pieces) // 3]

    def by_group(self, name: str, values: Sequence[Value]) -> Sequence[Value]:
        """Return the first of ``values``, one for each group that has leaves. Raise ValueError if they are fewer."""
        if len(values) < self.groups:
            raise ValueError(f"{name} must have one entry a parameter group, that is {self.groups}, got {len(values)}")
        return values[: self.groups]

    def by_leaf(self, name: str, values: Sequence[Value]) -> Sequence[Value]:
        """Return ``values``, one for each leaf; raises ValueError where there are others."""
        if len(values) != len(self.sizes):
            raise ValueError(f"{name} must have one entry a parameter, that is {len(self.sizes)}, got {len(values)}")
        return values

    def prepare(
        self, arguments: Sequence[Argument], numbers: Sequence[Sequence[float]] = (), option: Sequence[int] = ()
    ) -> Prepared:
        """Return the table of a launch on the current stream.

        Args:
            arguments: its lists, in the order in which the kernel numbers them.
            numbers: what else it reads; each sequence becomes a tensor of float64.
            option: what else an update must know of each leaf.

        Raises:
            RuntimeError: a tensor requires grad and would be written.
            TypeError: a tensor has another dtype than its parameter, or is sparse or a subclass without memory.
            ValueError: it has another shape, order in memory or device, its storage is too small, or it overlaps
                another of its list and would be written.
        """
        lists = [self._present(argument) for argument in arguments]
        try:
            key = Key((torch.is_grad_enabled(), tuple(option), *map(_fingerprint, arguments, lists)))
        except RuntimeError:  # a tensor without an address: say which
            self._check(arguments, lists)
            raise
        rows = self._rows.get(key, lambda: self._make_rows(arguments, lists, option))
        padded = [[*row, *[0.0] * (len(row) % 2)] for row in numbers]  # each begins at a multiple of 16 bytes
        flat = [number for row in padded for number in row]
        values = torch.tensor(flat, dtype=torch.float64, device="cpu").view(torch.int64)
        of_numbers = Key((struct.pack(f"{len(flat)}d", *flat),))  # bytes tell −0 from 0
        fixed, words, values = self._on_device([(_PIECES, self._fixed), (key, rows), (of_numbers, values)])
        pieces, starts, whole = fixed.split([3 * self.programs, self.groups + 1, 2])
        split = list(values.view(torch.float64).split([len(row) for row in padded])) if padded else []
        width, dtype = HEADER + len(lists), DTYPES[self.dtype]
        return Prepared(self.programs, self.warp, pieces, starts, whole, words, width, dtype, split)

    def _present(self, argument: Argument) -> list[Tensor]:
        """Return the tensors of a list, with one of address 0 in place of those that are missing."""
        given = argument.tensors
        if given is None:
            return [_ABSENT] * len(self.sizes)
        if len(given) != len(self.sizes):
            raise ValueError(
                f"{argument.name} must have one tensor a parameter, that is {len(self.sizes)}, got {len(given)}"
            )
        return [_ABSENT if tensor is None else tensor for tensor in given]

    def _make_rows(
        self, arguments: Sequence[Argument], lists: Sequence[Sequence[Tensor]], option: Sequence[int]
    ) -> Tensor:
        """Return the words of a table on the host."""
        self._check(arguments, lists)
        rows: list[int] = []
        for leaf, tensors in enumerate(zip(*lists, strict=True)):
            addresses = [tensor.data_ptr() for tensor in tensors]
            packed = not any(address % 16 for address in addresses)
            rows += (self.group[leaf], option[leaf] if option else 0, packed, *addresses)
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def _check(self, arguments: Sequence[Argument], lists: Sequence[Sequence[Tensor]]) -> None:
        """Check that every tensor can be taken by its address as one like its parameter."""
        for argument, tensors in zip(arguments, lists, strict=True):
            for i, (tensor, size, strides) in enumerate(zip(tensors, self.sizes, self.strides, strict=True)):
                if tensor is _ABSENT:
                    continue
                name = f"{argument.name}[{i}]"
                _check_plain(name, tensor, self.device)
                if tensor.dtype != self.dtype:
                    raise TypeError(f"{name} must have the dtype of its parameter, {self.dtype}, got {tensor.dtype}")
                if tensor.size() != size:
                    raise ValueError(
                        f"{name} must have the shape of its parameter, {tuple(size)}, got {tuple(tensor.size())}"
                    )
                if any(a != b and n != 1 for n, a, b in zip(size, tensor.stride(), strides, strict=True)):
                    raise ValueError(f"{name} must have the strides of its parameter, {strides}, got {tensor.stride()}")
                if argument.written and tensor.requires_grad and torch.is_grad_enabled():
                    raise RuntimeError(f"{name} requires grad and would be written: call under torch.no_grad()")
            if argument.written:
                _check_apart(argument.name, tensors)

    def _on_device(self, wanted: Sequence[tuple[Key, Tensor]]) -> list[Tensor]:
        """Return copies on the current stream's device: those of before, and the others, made by one transfer."""
        if self.device.type == "cpu":
            return [tensor for _, tensor in wanted]
        capturing = torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(self.device).cuda_stream
        kept = self._copies.setdefault(stream, LRUCache(3 * KEPT))
        # A graph gets copies of its own, but for the pieces, which never change: those of any stream will do.
        before = [self._pieces_for_graphs] if capturing else [kept.find(key) for key, _ in wanted]
        before += [None] * (len(wanted) - len(before))
        new = [i for i, tensor in enumerate(before) if tensor is None]
        made = iter(copies([wanted[i][1] for i in new], self.device, capturing))
        found = [next(made) if tensor is None else tensor for tensor in before]
        if capturing:
            graph_memory.keep(found[0])
        else:
            self._pieces_for_graphs = found[0]
            for (key, _), tensor in zip(wanted, found, strict=True):
                kept.keep(key, tensor)
        return found


def _check_apart(name: str, tensors: Sequence[Tensor]) -> None:
    """Check that no two tensors of a list overlap, as all are worked on at once."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), i) for i, t in enumerate(tensors))
    for (_, end, i), (begin, _, j) in pairwise(span for span in spans if span[0] < span[1]):
        if begin < end:
            raise ValueError(
                f"{name}[{min(i, j)}] and {name}[{max(i, j)}] must not overlap in memory: give one of them memory of "
                "its own with clone()"
            )


class Key:
    """A key of many parts, hashed once."""

    __slots__ = ("_hash", "parts")

    def __init__(self, parts: tuple[object, ...]) -> None:
        self.parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self._hash == other._hash and self.parts == other.parts


_PIECES = Key(("pieces",))


class LRUCache(Generic[Value]):
    """At most so many values, of which the one used longest ago makes room."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def find(self, key: Key) -> Value | None:
        return self._values.get(key)

    def keep(self, key: Key, value: Value) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._most:
            self._values.popitem(last=False)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key, made where there is none."""
        value = self.find(key)
        value = make() if value is None else value
        self.keep(key, value)
        return value


class GraphMemory:
    """What CUDA graphs read each time they are replayed: it is never used again, nor given back.

    The memory of the host that they copy tables from is pinned (torch captures no other copies) and asked for when a
    capture needs it, which torch allows: a process that never captures holds none.
    """

    WORDS = 1 << 17

    def __init__(self) -> None:
        self._block: Tensor | None = None
        self._used = 0
        self._kept: dict[int, Tensor] = {}
        self._lock = threading.RLock()

    def keep(self, tensor: Tensor) -> None:
        """Hold on to a tensor."""
        self._kept[tensor.data_ptr()] = tensor

    def take(self, words: int) -> Tensor:
        """Return pinned memory of so many words."""
        with self._lock:
            if self._block is None or self._used + words > self._block.numel():
                self._block = pinned(max(words, self.WORDS))
                self._used = 0
                self.keep(self._block)
            begin, self._used = self._used, self._used + words
            return self._block[begin : self._used]


graph_memory = GraphMemory()


def copies(values: Sequence[Tensor], device: torch.device, capturing: bool) -> list[Tensor]:
    """Return copies of vectors of int64 on ``device``, aligned to 16 bytes, by a transfer that nothing waits for."""
    sizes = [value.numel() for value in values]
    even = [size + size % 2 for size in sizes]
    total = sum(even)
    if not total:
        return [value.to(device) for value in values]
    host = graph_memory.take(total) if capturing else pinned(total)
    for part, value in zip(host.split(even), values, strict=True):
        part[: value.numel()].copy_(value)
    target = torch.empty(total, dtype=torch.int64, device=device)
    target.copy_(host, non_blocking=True)  # torch frees the host's memory only after the copy
    return [part[:size] for part, size in zip(target.split(even), sizes, strict=True)]


def pinned(words: int) -> Tensor:
    """Return memory of the host that copies need not wait for."""
    return torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=True)


def _check_plain(name: str, tensor: Tensor, device: torch.device) -> None:
    """Check that a tensor has its elements in memory of the device."""
    if tensor.device != device and not tensor.device.type == device.type == "cpu":  # "cpu:0" is the CPU too
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be strided, got {tensor.layout}")
    is_subclass = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    is_lazy = tensor.is_neg() or tensor._is_zerotensor()
    if is_subclass or is_lazy or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise TypeError(f"{name} must be a plain tensor with memory of its own, not a subclass or a lazy view")
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    if tensor.numel() and tensor.untyped_storage().nbytes() < needed:
        raise ValueError(
            f"{name} must have its elements in memory: its storage has {tensor.untyped_storage().nbytes()} bytes of "
            f"{needed}"
        )


def _fingerprint(argument: Argument, tensors: Sequence[Tensor]) -> tuple[object, ...]:
    """Return all that the table depends on."""
    return (
        argument.written,
        tuple(map(Tensor.data_ptr, tensors)),
        tuple(map(Tensor.size, tensors)),
        tuple(map(Tensor.stride, tensors)),
        tuple(map(Tensor.is_neg, tensors)),
        tuple([tensor.dtype for tensor in tensors]),
    )
