"""The same random numbers in every pass, so that dropout and stochastic depth draw the same masks.

Without it the difference of two gradients of a step, from which GAM takes the curvature, is mostly noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .capture import is_capturing


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


def get_state(device: torch.device) -> Tensor:
    """The state of torch's default generator of ``device``."""
    if device.type == "cpu":
        return torch.default_generator.get_state()
    module = _device_module(device)
    state: Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


def set_state(device: torch.device, state: Tensor) -> None:
    """Put torch's default generator of ``device`` into ``state``."""
    if device.type == "cpu":
        torch.default_generator.set_state(state)
    elif device.type == "mps":
        _device_module(device).set_rng_state(state)
    else:
        _device_module(device).set_rng_state(state, device)


def seed(device: torch.device, value: int) -> None:
    """Seed torch's default generator of ``device``, and no other (``torch.manual_seed`` seeds those of all devices)."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(value)
        return
    module = _device_module(device)
    with module.device(device) if hasattr(module, "device") else nullcontext():
        module.manual_seed(value)


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


class ReplayRNG:
    """Replays torch's default generators: that of the CPU and those of ``devices``.

    As a context manager it spans one step: call :meth:`begin` at the start of each pass. Every pass starts from the
    state at entry; on leaving, the state is that of the end of the first pass, as if it had been the only one (or, with
    ``begin(keep_last=True)``, of the last, if that drew anything); when the block raises, it is the state at entry.
    Python's and NumPy's generators are not touched.

    What only the first pass draws, because it reads what all of them use, belongs in a block of :meth:`reading`; the
    others call :meth:`skip_reading` at that point.

    Args:
        devices: accelerators whose generators are replayed besides the CPU's.

    Raises:
        RuntimeError: inside a CUDA graph capture, where generators cannot be read or set.

    >>> with ReplayRNG() as replay:
    ...     draws = []
    ...     for _ in range(3):
    ...         replay.begin()
    ...         draws.append(float(torch.rand(())))
    >>> len(set(draws))
    1
    """

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        accelerators = sorted({d for d in devices if d.type not in ("cpu", "meta")}, key=str)
        self.devices = [torch.device("cpu"), *accelerators]
        self._start: list[Tensor] | None = None
        self._after_first: list[Tensor] | None = None
        self._after_reading: list[Tensor] | None = None
        self._keep_last = False

    def __enter__(self) -> ReplayRNG:
        if is_capturing(self.devices):
            raise RuntimeError(
                "random numbers cannot be replayed inside a CUDA graph capture: construct the optimizer with "
                "replay_rng=False, which is exact for a model without dropout or other randomness"
            )
        self._start = self._states()
        self._after_first = self._after_reading = None
        self._begun = self._keep_last = self._is_after_reading = False
        return self

    def begin(self, *, keep_last: bool = False) -> None:
        """Start a pass: note the state the first pass ends with, and go back to the state at entry.

        Args:
            keep_last: whether it is the last pass whose end counts, as known by now; once true, it stays so.
        """
        assert self._start is not None, "begin() belongs inside the with block"
        self._keep_last = keep_last
        if not self._begun:
            self._begun = True
            return
        if self._after_first is None:
            self._after_first = self._states()
        self._is_after_reading = False
        self._set(self._start)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """In the first pass: what is drawn within the block is drawn in this pass only."""
        before = self._states()
        yield
        after = self._states()
        if not _same(before, after):
            self._after_reading = after
        self._is_after_reading = True

    def skip_reading(self) -> None:
        """In a later pass, at the point where the first was :meth:`reading`: go on as the first did after it."""
        if not self._is_after_reading:
            self._is_after_reading = True
            self._set(self._after_reading)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._set(self._start)
        elif self._after_first is not None and not (self._keep_last and self._has_drawn()):
            self._set(self._after_first)
        self._start = self._after_first = self._after_reading = None

    def _has_drawn(self) -> bool:
        """Whether the pass under way has; if it has not, what the first alone drew counts, as in plain training."""
        start = self._after_reading if self._is_after_reading and self._after_reading is not None else self._start
        return start is None or not _same(start, self._states())

    def _states(self) -> list[Tensor]:
        return [get_state(device) for device in self.devices]

    def _set(self, states: list[Tensor] | None) -> None:
        for device, state in zip(self.devices, states or (), strict=False):
            set_state(device, state)
