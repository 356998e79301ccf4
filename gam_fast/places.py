"""The places of a model that its forward may write to, and copies of what lies there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

STATISTICS = ("running_mean", "running_var")
"""Names of buffers that are taken to move in training mode: torch's batch norm moves them, and no version tells."""

SMALL = 4096
"""Up to so many elements, a copy is kept of what has not moved so far."""

ABSENT: Any = object()
"""Stands for a buffer that is not there."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False, slots=True)
class Place:
    """Where a tensor lies that a forward may write to, or put another into."""

    tensor: Any  # at the start of a pass: a tensor, None, or ABSENT
    own: Any = None  # the _buffers of its module; None for a parameter
    name: str = ""
    position: int = -1  # of a parameter, among those of the optimizer
    version: int = -1
    address: int = 0
    keeps: bool = False  # a copy, from step to step
    moves: bool = False  # as is known; neither version nor address need show it again
    start: Tensor | None = None  # its values at the start of a pass
    entry: Tensor | None = None  # those at entry, where they are others
    first: bool = False  # the first pass has moved it
    then: Any = None  # what lay there after the first pass
    after: Tensor | None = None  # its values then

    def now(self) -> Any:
        """Return the tensor that lies there."""
        if self.own is None:
            return self.tensor
        try:
            return self.own[self.name]
        except KeyError:
            return ABSENT

    def put(self, tensor: Any) -> None:
        """Let ``tensor`` lie there."""
        if self.own is not None and self.now() is not tensor:
            if tensor is ABSENT:
                del self.own[self.name]
            else:
                self.own[self.name] = tensor

    def note(self) -> None:
        """From here on, :meth:`shows` tells."""
        self.version, self.address = trace(self.tensor)

    def shows(self) -> bool:
        """Compare with what was noted."""
        return self.now() is not self.tensor or trace(self.tensor) != (self.version, self.address)

    def moved(self) -> bool:
        """Tell whether it may have moved since :meth:`note`."""
        return self.moves or self.shows()

    def copy(self) -> None:
        """Copy the values."""
        self.start = copied(self.tensor)

    @property
    def is_small(self) -> bool:
        return not isinstance(self.tensor, Tensor) or self.tensor.numel() <= SMALL or self.name in STATISTICS

    @property
    def may_be_trained(self) -> bool:
        return self.own is None and bool(self.tensor.requires_grad)


def trace(tensor: Any) -> tuple[int, int]:
    """Return what changes when a tensor is written to: its version and its address."""
    try:
        return tensor._version, tensor.data_ptr()
    except (AttributeError, RuntimeError):  # none there; an inference tensor, or one without storage
        return -1, 0


def copied(tensor: Any) -> Tensor | None:
    """A copy of the values; ``None`` where there are none, and of an expanded tensor, which nobody can write to."""
    if not isinstance(tensor, Tensor) or (0 in tensor.stride() and tensor.numel() > 1):
        return None
    return tensor.detach().clone()


def write(tensor: Tensor, values: Tensor, address: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Bring values back: in place where the tensor lies at ``address`` still, else by memory of its own.

    A tensor that was given other memory by ``.data =`` may share that with a parameter, which must not change.
    """
    if tensor.data_ptr() == address and tensor.shape == values.shape:
        pairs.append((tensor, values))
    else:
        tensor.data = values.clone()


def copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy all pairs, on an accelerator those of one dtype on one device together."""
    by_kind: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        target = pair[0]
        by_kind.setdefault(None if target.is_cpu else (target.dtype, target.device), []).append(pair)
    for alike in by_kind.values():
        targets, sources = zip(*alike, strict=True)
        torch._foreach_copy_(targets, sources)


def _bits(tensor: Tensor) -> Tensor:
    """Return what can be compared without regard to NaN."""
    if tensor.is_floating_point() or tensor.is_complex():
        kind = _BITS.get(tensor.element_size())
        return torch.view_as_real(tensor) if kind is None else tensor.view(kind)
    return tensor


def differing(places: Sequence[Place]) -> list[Place]:
    """Those whose values are not those of the copy, bit for bit. Waits for an accelerator, once per device."""
    by_device: dict[torch.device, tuple[list[Place], list[Tensor]]] = {}
    for place in places:
        if isinstance(place.tensor, Tensor) and place.start is not None:
            chosen, flags = by_device.setdefault(place.tensor.device, ([], []))
            chosen.append(place)
            flags.append((_bits(place.tensor) != _bits(place.start)).any())
    return [
        place
        for chosen, flags in by_device.values()
        for place, flag in zip(chosen, torch.stack(flags).tolist(), strict=True)
        if flag
    ]


def can_be_copied(tensor: Tensor) -> bool:
    """Rule out what has no memory of its own, or another notion of it (a DTensor, quantized weights)."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or is_lazy(tensor):
        return False
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_inference())


def size_of(tensor: Tensor | None) -> int:
    """Bytes."""
    return 0 if tensor is None or is_lazy(tensor) else tensor.numel() * tensor.element_size()
