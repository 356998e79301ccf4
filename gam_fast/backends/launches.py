"""Launch Triton kernels: device, stream, launch shape, and notes to autograd and the allocator."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.table import BLOCK_OF_SUMS, BLOCK_OF_TOTALS, THREADS_OF_SUMS, THREADS_OF_TOTALS
from .tables import Argument, Prepared


class Shape(NamedTuple):
    """Launch shape: a program loads ``block`` elements per array at once, with ``threads`` threads (whole warps)."""

    block: int
    threads: int


OF_UPDATES = Shape(1024, 128)
"""A thread loads 16 bytes of each 16-bit array, the widest access there is, and twice that of an fp32 array. With the
five to nine arrays of an update, this is enough to keep memory busy, and takes 60 to 130 registers."""

OF_SUMS = Shape(BLOCK_OF_SUMS, THREADS_OF_SUMS)
"""The bits of a sum depend on this shape."""


def start(kernel: Any, programs: int, *arguments: object, warps: int, **constants: object) -> None:
    """Start a kernel on the current stream of the current device. All launches go through here."""
    if programs:
        kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False, **constants)


def launch(kernel: Any, prepared: Prepared, *arguments: object, is_sum: bool = False, **constants: object) -> None:
    """Start a kernel with one program per piece."""
    from triton import language

    shape = OF_SUMS if is_sum else OF_UPDATES
    start(
        kernel,
        prepared.programs,
        prepared.pieces,
        prepared.table,
        *arguments,
        TYPE=getattr(language, prepared.dtype),
        WIDTH=prepared.width,
        BLOCK=shape.block,
        warps=shape.threads // prepared.warp,
        **constants,
    )


def launch_totals(kernel: Any, prepared: Prepared, parts: Tensor, starts: Tensor, found: Tensor) -> None:
    """Start the kernel that adds up the parts of each group, with one program per group."""
    warps = THREADS_OF_TOTALS // prepared.warp
    groups = starts.numel() - 1
    start(kernel, groups, parts, starts, found, SUMS=found.size(1), BLOCK=BLOCK_OF_TOTALS, warps=warps)


def guard(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` current, so that kernels start on its current stream."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def after(arguments: Sequence[Argument], *last: Sequence[Tensor | None] | None) -> None:
    """Tell autograd which tensors were written, and the allocator which memory is still being read.

    Args:
        arguments: all lists of the launch.
        last: lists that other code allocated, perhaps for another stream: gradients, and the backup.
    """
    written = [
        tensor
        for argument in arguments
        if argument.written
        for tensor in argument.tensors or ()
        if tensor is not None and not tensor.is_inference()
    ]
    torch.autograd.graph.increment_version(written)
    read = [tensor for tensors in last for tensor in tensors or () if tensor is not None and tensor.is_cuda]
    if read:
        stream = torch.cuda.current_stream(read[0].device)
        for tensor in read:
            tensor.record_stream(stream)
