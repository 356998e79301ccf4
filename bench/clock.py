"""Time on a device: marks in its stream of work, and the seconds between two of them.

A GPU is timed by events, with other work to do first, so that the launches of what is timed queue up: what counts is
its own time. What the host needs to prepare the launches is a figure of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device == "cuda":
        torch.cuda.synchronize()


def now(device: str) -> float:
    """Seconds of the host's clock, when the device has done all it was given."""
    synchronize(device)
    return time.perf_counter()


CYCLES_PER_SECOND = 2e9
"""The clock rate of a GPU, or somewhat more."""


def keep_busy(device: str, seconds: float) -> None:
    """Give a GPU that much to do, so that the host is ahead of it, as in training."""
    if device == "cuda":
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))


CALLS = 10
"""Calls that are timed together on a GPU."""


def time_call(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the seconds that one call takes the device, and those that it takes the host."""
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
        """A moment: after what the device was given before, and before what it is given next."""

    def seconds(self, start: Any, end: Any) -> float:
        """From one mark to a later one; waits for the device to come to that."""


class HostClock:
    """For a CPU, where work is done when its call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """By events in the current stream."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return 1e-3 * float(start.elapsed_time(end))


def clock(device: str) -> Clock:
    """The clock of a device."""
    return CudaClock() if device == "cuda" else HostClock()
