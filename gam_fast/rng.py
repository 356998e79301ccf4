"""The same random numbers in every pass, so that dropout and stochastic depth draw the same masks.

Without it the difference of two gradients of a step, from which GAM takes the curvature, is mostly noise.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


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


def _capturing(devices: Iterable[torch.device]) -> bool:
    return any(device.type == "cuda" for device in devices) and torch.cuda.is_current_stream_capturing()


class ReplayRNG:
    """Replays torch's default generators: that of the CPU and those of ``devices``.

    As a context manager it spans one step: call :meth:`begin` at the start of each pass. Every pass starts from the
    state at entry; on leaving, the state is that of the end of the first pass, as if it had been the only one (or, with
    ``begin(keep_last=True)``, of the last); when the block raises, it is the state at entry. Python's and NumPy's
    generators are not touched.

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
        self._keep_last = False

    def __enter__(self) -> ReplayRNG:
        if _capturing(self.devices):
            raise RuntimeError(
                "random numbers cannot be replayed inside a CUDA graph capture: construct the optimizer with "
                "replay_rng=False, which is exact for a model without dropout or other randomness"
            )
        self._start = [get_state(device) for device in self.devices]
        self._after_first = None
        self._begun = self._keep_last = False
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
        if self._after_first is None and not keep_last:
            self._after_first = [get_state(device) for device in self.devices]
        self._set(self._start)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._set(self._start)
        elif self._after_first is not None and not self._keep_last:
            self._set(self._after_first)
        self._start = self._after_first = None

    def _set(self, states: list[Tensor] | None) -> None:
        for device, state in zip(self.devices, states or (), strict=False):
            set_state(device, state)
