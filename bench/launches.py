"""Count kernel launches by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

TRANSFERS = ("Memcpy", "Memset")
"""Prefixes of GPU events that are not kernels."""


def count(events: Iterable[Any]) -> int:
    """Count the profiler's events that are kernels: on a GPU, and not a copy, a fill or a user's label."""
    return sum(
        event.device_type.name == "CUDA"
        and not event.name.startswith(TRANSFERS)
        and not getattr(event, "is_user_annotation", False)
        for event in events
    )


def launches(run: Callable[[], object]) -> int:
    """Return how many kernels ``run`` launches."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    return count(profiler.events() or ())
