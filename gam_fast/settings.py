"""What one step is told by the optimizer it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .buffers import ForwardState
from .capture import refuse_to_look
from .recipes import Recipe
from .rng import ReplayRNG


@dataclass(slots=True)  # not frozen, which would cost microseconds in every step
class Settings:
    """The options of an optimizer that a step goes by."""

    recipe: Recipe
    model: nn.Module | None = None
    replay_rng: ReplayRNG | None = None
    freeze_running_statistics: bool = True
    moving_buffers: Sequence[str] = ()
    forward_state: ForwardState | None = None
    clip_grad_norm: float | None = None
    on_nonfinite: str = "raise"
    sync: str = "global"
    ascent_share: float = 1.0
    goes_on: Callable[[float], bool] | None = None
    """Tell by ‖g0‖² if the step goes on to other points; ``None`` where that is not asked."""
    others: Sequence[Tensor] = ()
    """Parameters of ``model`` that belong to another optimizer."""
    measure_change: bool = False
    """True if :attr:`Step.relative_change` is wanted."""

    def check_capture(self, devices: Iterable[torch.device]) -> None:
        """Raises RuntimeError where a CUDA graph is being captured that could not repeat the step."""
        looking = [f"on_nonfinite={self.on_nonfinite!r}"] if self.on_nonfinite != "ignore" else []
        if self.goes_on is not None:
            looking.append("a rule WhenSteep")
        refuse_to_look(looking, devices)
