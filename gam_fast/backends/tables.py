"""Launch metadata: the tensor lists of one launch, checked, and their addresses in device memory.

This is for kernels that are launched from Python; the compiled core does the same in C++ (``csrc/ops.cpp``,
``csrc/cuda/tables.cpp``). ``kernels/table.py`` describes the layout of a table.

A table is built and copied to the device, asynchronously, only if the tensors differ from those of the step before.
Numbers are copied only if they have changed (Adam's corrections change in each step). So a launch needs at most one
copy, and mostly none. During the capture of a CUDA graph each launch gets its own copy, from memory that is kept for
good, because the graph repeats the copy.
"""

from __future__ import annotations

import math
import operator
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch
from torch import Tensor

from ..kernels import table
from ..kernels.table import CHUNK, HEADER
from ..ownership import is_dense
from .base import Block

KEPT = 96
"""Number of copies that are kept: of tables, pieces and numbers. A step has about eight launches, and the memory of
gradients may alternate between a few places."""

CHECKED = 16
"""Number of lists that are known to be right. A step has about seven, each in two to four launches."""

DTYPES: dict[torch.dtype, str] = {getattr(torch, name): name for name in table.DTYPES}
"""Names of the dtypes that kernels accept."""

PLAIN = {Tensor, torch.nn.Parameter}
"""Types of tensors that are checked as a list."""

_ABSENT = torch.empty(0, dtype=torch.float32, device="cpu")  # its address is 0

graph_memory: list[Tensor] = []
"""Memory that CUDA graphs read at each replay. It is neither reused nor freed."""


@dataclass(frozen=True)
class Argument:
    """One list of a launch. The list, or single tensors in it, may be ``None``.

    Attributes:
        name: its name in error messages.
        tensors: aligned with the leaves.
        written: whether the launch writes to it.
    """

    name: str
    tensors: Sequence[Tensor | None] | None
    written: bool = False


@dataclass(frozen=True)
class Prepared:
    """Arguments of a launch with one program per piece. ``starts`` has the first piece of each group, and the end.

    ``warp`` is the number of threads in a warp of the device, ``width`` the number of words in a table row.
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
    """The tables of one set of leaves on one device.

    Args:
        leaves: a block of parameters.

    Raises:
        TypeError: the leaves are of several dtypes, or of one that kernels do not take.
        ValueError: a leaf is not dense in memory.
    """

    def __init__(self, leaves: Block) -> None:
        self.device = leaves.params[0].device
        self.group = list(leaves.group)
        self.groups = max(self.group) + 1
        self.dtype = leaves.params[0].dtype
        self.sizes = [param.size() for param in leaves.params]
        self.strides = [param.stride() for param in leaves.params]
        if {param.dtype for param in leaves.params} - {self.dtype} or self.dtype not in DTYPES:
            found = ", ".join(map(str, dict.fromkeys(param.dtype for param in leaves.params)))
            raise TypeError(f"parameters must be of one dtype of float64, float32, bfloat16 and float16, got {found}")
        for i, (size, strides) in enumerate(zip(self.sizes, self.strides, strict=True)):
            if not is_dense(size, strides):
                raise ValueError(f"params[{i}] must be dense in memory, got {tuple(size)} by {strides}")
        self._bytes = [param.nbytes for param in leaves.params]
        pieces, starts = self._pieces()
        self.programs = len(pieces) // 3
        self._fixed = torch.tensor([*pieces, *starts, 0, self.programs], dtype=torch.int64, device="cpu")
        self._kept: dict[object, Tensor] = {}  # by stream and content, most recently used last
        self._checked: set[tuple[tuple[int, ...], bool]] = set()  # addresses of lists, and whether they are written
        self._pieces_for_graphs: Tensor | None = None
        self.warp = 32
        if self.device.type == "cuda":
            self.warp = getattr(torch.cuda.get_device_properties(self.device), "warp_size", 32)

    def fits(self, leaves: Block) -> bool:
        """Return whether ``leaves`` have the same shapes, strides, dtype, groups and device."""
        return (
            self.group == leaves.group
            and self.sizes == [param.size() for param in leaves.params]
            and self.strides == [param.stride() for param in leaves.params]
            and all(param.device == self.device and param.dtype == self.dtype for param in leaves.params)
        )

    def _pieces(self) -> tuple[list[int], list[int]]:
        """Return leaf, first element and length of each piece, ordered by group, and the first piece of each group."""
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

    def prepare(
        self, arguments: Sequence[Argument], numbers: Sequence[Sequence[float]] = (), option: Sequence[int] = ()
    ) -> Prepared:
        """Return the table of a launch on the current stream.

        Args:
            arguments: its lists, in the order of the kernel's numbering.
            numbers: further numbers for the kernel; each sequence becomes a float64 tensor.
            option: for each leaf, the index of its numbers in an update.

        Raises:
            ValueError: a tensor does not match its parameter, or overlaps another one in a list that is written.
        """
        lists = [self._tensors(argument) for argument in arguments]
        addresses = [tuple(map(Tensor.data_ptr, tensors)) for tensors in lists]
        lazy = [any(map(Tensor.is_neg, tensors)) for tensors in lists]

        def rows() -> Tensor:
            for argument, tensors, places, is_lazy in zip(arguments, lists, addresses, lazy, strict=True):
                if argument.tensors is None or (not is_lazy and (places, argument.written) in self._checked):
                    continue
                if is_lazy or not self._are_usual(tensors, places):
                    self._check(argument, tensors)
                if argument.written:
                    self._check_apart(argument.name, places)
                if len(self._checked) == CHECKED:
                    self._checked.clear()
                self._checked.add((places, argument.written))
            bits: Iterable[int] = addresses[0]
            for places in addresses[1:]:
                bits = map(operator.or_, bits, places)
            packed = [not word % 16 for word in bits]
            words = zip(self.group, option or [0] * len(packed), packed, *addresses, strict=True)
            return torch.frombuffer(array("q", chain.from_iterable(words)), dtype=torch.int64)

        padded = [[*row, *[0.0] * (len(row) % 2)] for row in numbers]  # each row begins at a multiple of 16 bytes
        flat = [number for row in padded for number in row]
        of_numbers = torch.tensor(flat, dtype=torch.float64, device="cpu").view(torch.int64)
        fixed, words, values = self._on_device(
            [
                ("pieces", lambda: self._fixed),
                ((*addresses, *lazy, tuple(option)), rows),
                (struct.pack(f"{len(flat)}d", *flat), lambda: of_numbers),  # bytes distinguish −0 from 0
            ]
        )
        pieces, starts, whole = fixed.split([3 * self.programs, self.groups + 1, 2])
        split = list(values.view(torch.float64).split([len(row) for row in padded])) if padded else []
        width, dtype = HEADER + len(lists), DTYPES[self.dtype]
        return Prepared(self.programs, self.warp, pieces, starts, whole, words, width, dtype, split)

    def _tensors(self, argument: Argument) -> list[Tensor]:
        """Return the tensors of a list, with a tensor of address 0 in place of missing ones."""
        given = [None] * len(self.sizes) if argument.tensors is None else argument.tensors
        if len(given) != len(self.sizes):
            raise ValueError(
                f"{argument.name} must have one tensor per parameter, that is {len(self.sizes)}, got {len(given)}"
            )
        return [_ABSENT if tensor is None else tensor for tensor in given]

    def _are_usual(self, tensors: Sequence[Tensor], addresses: Sequence[int]) -> bool:
        """Return whether all match their parameters in every way: the check of a list at once, a tenth of the time."""
        return (
            0 not in addresses
            and set(map(type, tensors)) <= PLAIN
            and {tensor.dtype for tensor in tensors} == {self.dtype}
            and {tensor.device for tensor in tensors} == {self.device}
            and list(map(Tensor.size, tensors)) == self.sizes
            and list(map(Tensor.stride, tensors)) == self.strides
        )

    def _check(self, argument: Argument, tensors: Sequence[Tensor]) -> None:
        """Check that every tensor matches its parameter in dtype, device, shape, strides and memory."""
        for i, (tensor, size, strides) in enumerate(zip(tensors, self.sizes, self.strides, strict=True)):
            if tensor is not _ABSENT and not self._is_like(tensor, size, strides):
                bytes_there = tensor.untyped_storage().nbytes()
                found = f"{tensor.dtype} on {tensor.device} in {bytes_there} bytes, {tuple(tensor.size())}"
                raise ValueError(
                    f"{argument.name}[{i}] must be a plain tensor with its elements in memory as its parameter, "
                    f"{self.dtype} on {self.device}, {tuple(size)} by {strides}, got {found} by {tensor.stride()}"
                )

    def _check_apart(self, name: str, addresses: Sequence[int]) -> None:
        """Check that no two tensors of a list overlap, because the kernel processes them concurrently."""
        ends = sorted(map(operator.add, addresses, self._bytes))
        if all(map(operator.le, ends, sorted(addresses)[1:])):  # of non-empty ones: enough, and fast
            return
        spans = sorted(
            (begin, begin + size, i) for i, (begin, size) in enumerate(zip(addresses, self._bytes, strict=True))
        )
        for (_, end, i), (begin, _, j) in pairwise(span for span in spans if span[0] and span[0] < span[1]):
            if begin < end:
                raise ValueError(
                    f"{name}[{min(i, j)}] and {name}[{max(i, j)}] must not overlap in memory: give one of them memory "
                    "of its own with clone()"
                )

    def _is_like(self, tensor: Tensor, size: torch.Size, strides: tuple[int, ...]) -> bool:
        end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
        return (
            (tensor.device == self.device or tensor.device.type == self.device.type == "cpu")  # "cpu:0" is the CPU too
            and tensor.dtype == self.dtype
            and tensor.size() == size
            and all(a == b or n == 1 for n, a, b in zip(size, tensor.stride(), strides, strict=True))
            and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
            and not (tensor.is_neg() or tensor._is_zerotensor())
            and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
            and (not tensor.numel() or tensor.untyped_storage().nbytes() >= end)
        )

    def _on_device(self, wanted: Sequence[tuple[object, Callable[[], Tensor]]]) -> list[Tensor]:
        """Return copies on the current stream's device: earlier copies where possible, the rest by one transfer."""
        stream, capturing = 0, False
        if self.device.type != "cpu":
            capturing = torch.cuda.is_current_stream_capturing()
            stream = torch.cuda.current_stream(self.device).cuda_stream
        # A graph gets its own copies, except of the pieces: these never change, so a copy of any stream serves.
        found = [None if capturing else self._kept.pop((stream, key), None) for key, _ in wanted]
        if capturing:
            found[0] = self._pieces_for_graphs
        new = [i for i, tensor in enumerate(found) if tensor is None]
        for i, tensor in zip(new, copies([wanted[i][1]() for i in new], self.device, capturing), strict=True):
            found[i] = tensor
        result = [tensor for tensor in found if tensor is not None]
        if capturing:
            graph_memory.append(result[0])
            return result
        self._pieces_for_graphs = result[0]
        for (key, _), tensor in zip(wanted, result, strict=True):
            self._kept[stream, key] = tensor
        while len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        return result


def copies(values: Sequence[Tensor], device: torch.device, capturing: bool) -> list[Tensor]:
    """Return copies of int64 vectors on ``device``, aligned to 16 bytes, by one asynchronous transfer.

    For a CUDA graph, the host memory of the transfer is pinned and kept: torch captures no other copies.
    """
    sizes = [value.numel() for value in values]
    even = [size + size % 2 for size in sizes]
    total = sum(even)
    if device.type == "cpu" or not total:
        return [value.to(device) for value in values]
    host = torch.empty(total, dtype=torch.int64, device="cpu", pin_memory=True)
    if capturing:
        graph_memory.append(host)
    for part, value in zip(host.split(even), values, strict=True):
        part[: value.numel()].copy_(value)
    target = torch.empty(total, dtype=torch.int64, device=device)
    target.copy_(host, non_blocking=True)  # torch frees the host's memory only after the copy
    return [part[:size] for part, size in zip(target.split(even), sizes, strict=True)]
