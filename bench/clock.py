"""Time on a device: marks in its stream of work, and the seconds between two marks.

A GPU is timed by events. It first gets other work, so that the timed launches queue up and the events measure the
device's own time. The host's time to prepare the launches is measured separately.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


def synchronize(device: str) -> None:
    """Wait until a GPU has finished its work; a CPU always has."""
    if device == "cuda":
        torch.cuda.synchronize()


def now(device: str) -> float:
    """Return the host's clock in seconds, after the device has finished its work."""
    synchronize(device)
    return time.perf_counter()


CYCLES_PER_SECOND = 2e9
"""The clock rate of a GPU, or somewhat more."""


def keep_busy(device: str, seconds: float) -> None:
    """Give a GPU work for ``seconds``, so that the host runs ahead of it, as in training."""
    if device == "cuda":
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))


CALLS = 10
"""Number of calls that are timed together on a GPU."""


def time_call(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the seconds of the device, and of the host, for one call."""
    start = now(device)
    run()
    host = time.perf_counter() - start
    if device != "cuda":
        return host, host
    own, marks = CudaClock(), []
    keep_busy(device, 1.5 * CALLS * host)
    marks.append(own.mark())
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    host = (time.perf_counter() - start) / CALLS
    marks.append(own.mark())
    return own.seconds(*marks) / CALLS, host


class Clock(Protocol):
    """Marks moments of a run without making the host wait for the device."""

    def mark(self) -> Any:
        """Mark the present point in the device's stream of work."""

    def seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two marks; wait until the device has reached the second."""


class HostClock:
    """The clock of a CPU, where work is done when its call returns."""

    def mark(self) -> float:
        """Return the host's time."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """Return the difference of two marks."""
        return end - start


class CudaClock:
    """The clock of a GPU, by events in the current stream."""

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Wait for the second event, and return the time between the two."""
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end))


def clock(device: str) -> Clock:
    """Return the clock of a device."""
    return CudaClock() if device == "cuda" else HostClock()
