"""What one step is told by the optimizer it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .backends import Backend
from .recipes import Recipe


@dataclass(slots=True)  # not frozen, which would cost microseconds in every step
class Settings:
    """What the engine asks of every walk."""

    recipe: Recipe
    select: Callable[[torch.device], Backend]
    model: nn.Module | None = None
    replay_rng: bool = True
    freeze_running_statistics: bool = True
    clip_grad_norm: float | None = None
    on_nonfinite: str = "raise"
    sync: str = "global"
    ascent_share: float = 1.0
    goes_on: Callable[[float], bool] | None = None
    """Whether ‖g0‖² is such that the walk goes on; ``None`` where that is not asked."""
    measure_change: bool = False
    """Whether :attr:`Walk.relative_change` is wanted."""

    def check_capture(self, devices: Iterable[torch.device]) -> None:
        """Raises RuntimeError where a CUDA graph is being captured that could not repeat the step."""
        if all(device.type != "cuda" for device in devices) or not torch.cuda.is_current_stream_capturing():
            return
        found = {
            f"on_nonfinite={self.on_nonfinite!r}": self.on_nonfinite != "ignore",
            "a rule WhenSteep": self.goes_on is not None,
            "an automatic radius": self.measure_change,
        }
        looking = [name for name, looks in found.items() if looks]
        if looking:
            raise RuntimeError(
                f"{' and '.join(looking)} looks at the norms of a step, which a CUDA graph cannot: construct the "
                "optimizer with on_nonfinite='ignore' and without such rules and radii to capture it"
            )
