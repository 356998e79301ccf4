"""Kernels that a GPU is given, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

TRANSFERS = ("Memcpy", "Memset")
"""How events begin that occupy a GPU and are no kernels."""


def count(events: Iterable[Any]) -> int:
    """Kernels among events of the profiler: on a GPU, and neither a copy, a fill nor a label of the user's."""
    return sum(
        event.device_type.name == "CUDA"
        and not event.name.startswith(TRANSFERS)
        and not getattr(event, "is_user_annotation", False)
        for event in events
    )


def launches(run: Callable[[], object]) -> int:
    """How many kernels ``run`` gives the GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    return count(profiler.events() or ())
