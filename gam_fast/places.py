"""The places of a model that its forward may write to, and copies of their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

STATISTICS = ("running_mean", "running_var")
"""Buffers that count as moving in training mode: batch norm moves them without a change of version."""

SMALL = 4096
"""Largest number of elements of which a copy is kept although the tensor has not moved so far."""

ABSENT: Any = object()
"""Stands for a missing buffer."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False, slots=True)
class Place:
    """A buffer or parameter that a forward may write to or replace."""

    tensor: Any  # at the start of a pass: a tensor, None, or ABSENT
    own: Any = None  # the _buffers or _parameters of its module; None for a parameter of no known module
    name: str = ""
    position: int = -1  # index of a parameter among those of the optimizer
    version: int = -1
    address: int = 0
    keeps: bool = False  # whether it keeps a copy from step to step
    moves: bool = False  # known to move, so version and address need not show it again
    start: Tensor | None = None  # values at the start of a pass
    entry: Tensor | None = None  # values at entry, if they differ from start
    first: bool = False  # whether the first pass has moved it
    then: Any = None  # the tensor after the first pass
    after: Tensor | None = None  # its values after the first pass

    def now(self) -> Any:
        """Return the tensor that is in this place."""
        if self.own is None:
            return self.tensor
        try:
            return self.own[self.name]
        except KeyError:
            return ABSENT

    def put(self, tensor: Any) -> None:
        """Put ``tensor`` into this place."""
        if self.own is not None and self.now() is not tensor:
            if tensor is ABSENT:
                del self.own[self.name]
            else:
                self.own[self.name] = tensor

    def note(self) -> None:
        """Record version and address for :meth:`shows`."""
        self.version, self.address = trace(self.tensor)

    def shows(self) -> bool:
        """Return whether tensor, version or address differ from the record."""
        return self.now() is not self.tensor or trace(self.tensor) != (self.version, self.address)

    def moved(self) -> bool:
        """Return whether the place may have moved since :meth:`note`."""
        return self.moves or self.shows()

    def copy(self) -> None:
        """Copy the values."""
        self.start = copied(self.tensor)

    @property
    def is_small(self) -> bool:
        """True if a copy is cheap enough to keep."""
        return not isinstance(self.tensor, Tensor) or self.tensor.numel() <= SMALL or self.name in STATISTICS

    @property
    def may_be_trained(self) -> bool:
        """True if this is a parameter that requires a gradient."""
        is_parameter = self.position >= 0 or isinstance(self.tensor, nn.Parameter)
        return is_parameter and bool(self.tensor.requires_grad)


def trace(tensor: Any) -> tuple[int, int]:
    """Return version and address of a tensor, which change when it is written to or replaced."""
    try:
        return tensor._version, tensor.data_ptr()
    except (AttributeError, RuntimeError):  # None or ABSENT; an inference tensor, or one without storage
        return -1, 0


def copied(tensor: Any) -> Tensor | None:
    """Copy the values; ``None`` if there are none, or for an expanded tensor, which cannot be written to."""
    if not isinstance(tensor, Tensor) or (0 in tensor.stride() and tensor.numel() > 1):
        return None
    return tensor.detach().clone()


def write(tensor: Tensor, values: Tensor, address: int, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Restore values: in place if the tensor is still at ``address``, otherwise in new memory.

    A tensor that got other memory by ``.data =`` may share it with a parameter, which must not change.
    """
    if tensor.data_ptr() == address and tensor.shape == values.shape:
        pairs.append((tensor, values))
    else:
        tensor.data = values.clone()


def copy_all(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy all pairs; on an accelerator, those of one dtype on one device together."""
    by_kind: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        target = pair[0]
        by_kind.setdefault(None if target.is_cpu else (target.dtype, target.device), []).append(pair)
    for alike in by_kind.values():
        targets, sources = zip(*alike, strict=True)
        torch._foreach_copy_(targets, sources)


def _bits(tensor: Tensor) -> Tensor:
    """Return a view of the bits, for which NaN equals itself."""
    if tensor.is_floating_point() or tensor.is_complex():
        kind = _BITS.get(tensor.element_size())
        return torch.view_as_real(tensor) if kind is None else tensor.view(kind)
    return tensor


def differing(places: Sequence[Place]) -> list[Place]:
    """Return the places that differ from their copy in any bit. Wait for an accelerator, once per device."""
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
    """Return whether plain copies of ``tensor`` work; they do not for a DTensor or quantized weights, for example."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or is_lazy(tensor):
        return False
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta or tensor.is_inference())


def size_of(tensor: Tensor | None) -> int:
    """Return the size in bytes."""
    return 0 if tensor is None or is_lazy(tensor) else tensor.numel() * tensor.element_size()
