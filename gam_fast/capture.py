"""Refuse operations that a CUDA graph cannot hold, with a clear error during its capture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def is_capturing(devices: Iterable[torch.device]) -> bool:
    """Return whether a CUDA graph is capturing work on one of the devices; a capture makes its device current."""
    for device in devices:  # no generator: it takes twice as long, in every step
        if device.type == "cuda":
            return torch.cuda.is_current_stream_capturing()
    return False


def refuse_to_look(looking: Sequence[str], devices: Iterable[torch.device]) -> None:
    """Refuse options that wait for a device.

    Args:
        looking: the options of a step that look at norms.
        devices: the devices of these norms.

    Raises:
        RuntimeError: a graph is being captured.
    """
    if looking and is_capturing(devices):
        raise RuntimeError(
            f"{' and '.join(looking)} looks at the norms of a step, which a CUDA graph cannot: construct the optimizer "
            "with on_nonfinite='ignore' and without such rules and radii to capture it"
        )
