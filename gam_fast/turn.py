"""What the body of the loop over ``passes()`` gets: which pass it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """One pass of a step, as :meth:`FlatOptimizer.passes` yields it.

    Attributes:
        index: 0 for the pass at θ, then 1, 2, ….
        passes: how many there are.
    """

    index: int
    passes: int
    _backward: Callable[[Tensor], None] = field(default=Tensor.backward, repr=False, compare=False)

    @property
    def last(self) -> bool:
        """Whether this is the last pass of the step."""
        return self.index == self.passes - 1

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, for a loop that serves every method: ExactGAM differentiates the loss itself, twice.

        Called several times in one pass, the losses add up; ExactGAM then holds the graphs of all of them at once.

        Raises:
            TypeError, RuntimeError: for ExactGAM, a loss that is not one number in a tensor, or a constant.
        """
        self._backward(loss)
