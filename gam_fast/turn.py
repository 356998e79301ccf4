"""What the body of the loop over ``passes()`` gets: which pass it is, and which part of the batch it wants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .rows import leading


class Portion:
    """The part of the batch that the ascent passes of one step are to see, and whether anybody has asked for it.

    Args:
        share: that part, over 0 and at most 1.

    Attributes:
        asked: whether a pass of several was told its part of the batch.
        weight: of the pass under way, what its gradient is multiplied by to be that of all micro-batches.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.asked = False
        self.weight = 1.0
        self._cuts: str | None = None

    def _cut(self, what: str) -> None:
        """Somebody asks; a batch is cut by its rows or by its micro-batches, in all passes alike."""
        self.asked = True
        if self.share < 1.0 and self._cuts not in (None, what):
            raise RuntimeError(
                "turn.rows() or turn.count() in a step that iterates over micro_batches(), which are a share of the "
                "batch already: leave one of them out"
            )
        self._cuts = what

    def count(self, n: int, share: float) -> int:
        """How many of ``n`` rows a pass sees: the nearest whole number to ``share · n``, but at least one."""
        self._cut("rows")
        return _part(n, share)

    def rows(self, batch: Any, share: float) -> Any:
        """See :meth:`Turn.rows`."""
        self._cut("rows")
        return batch if share == 1.0 else leading(batch, lambda n: _part(n, share))

    def batches(self, batches: Sequence[Any], share: float) -> Sequence[Any]:
        """The micro-batches that a pass sees; their gradients are then weighted as those of all."""
        self._cut("batches")
        kept = batches[: _part(len(batches), share)]
        self.weight = len(batches) / len(kept)
        return kept


def _part(n: int, share: float) -> int:
    return min(n, max(1, math.floor(share * n + 0.5)))


@dataclass(frozen=True)
class Turn:
    """One pass of a step, as :meth:`FlatOptimizer.passes` yields it.

    Attributes:
        index: 0 for the pass at θ, then 1, 2, ….
        passes: how many there are; with :class:`gam_fast.active.WhenSteep`, how many there are at most, until the
            gradient of the first has decided it.
        share: the part of the batch that this pass is to see: ``ascent_share`` of the optimizer, and 1.0 in the last.
    """

    index: int
    passes: int
    share: float = 1.0
    _backward: Callable[[Tensor], None] = field(default=Tensor.backward, repr=False, compare=False)
    _portion: Portion = field(default_factory=lambda: Portion(1.0), repr=False, compare=False)

    @property
    def last(self) -> bool:
        """Whether this is the last pass of the step."""
        return self.index == self.passes - 1

    def rows(self, *batch: Any) -> Any:
        """The leading rows of the batch that this pass is to see; all of them in the last pass.

        Args:
            batch: tensors or arrays, or mappings, lists, tuples or dataclasses of them. All that have rows have the
                same number ``n`` of them, of which the first ``share · n`` are taken, rounded, at least one. (A
                BatchNorm over rows needs two: mind the last batch of an epoch, or let the loader drop it.) A list of
                tensors is the parts of a batch, as a ``DataLoader`` collates it; a list without tensors is one entry a
                row.

        Returns what it was given, a tuple where it was given several. Nothing is copied.

        Raises:
            ValueError: tensors of different lengths, a list that is not one entry a row, a list of examples.
            TypeError: nothing that has rows, or what cannot be cut, such as a sparse tensor.
            RuntimeError: the step iterates over :meth:`FlatOptimizer.micro_batches`, which are cut already.

        >>> import torch
        >>> Turn(0, 2, share=0.25).rows(torch.arange(8), {"weight": torch.ones(8, 3)})
        (tensor([0, 1]), {'weight': tensor([[1., 1., 1.],
                [1., 1., 1.]])})
        """
        if not batch:
            raise TypeError("turn.rows() needs the batch: x, y = turn.rows(x, y)")
        found = self._portion.rows(batch, self.share)
        return found[0] if len(batch) == 1 else found

    def count(self, n: int) -> int:
        """How many of ``n`` rows this pass is to see: for batches that :meth:`rows` does not know how to cut.

        >>> Turn(0, 4, share=0.25).count(10), Turn(3, 4).count(10)
        (3, 10)
        """
        return self._portion.count(n, self.share)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, for a loop that serves every method: ExactGAM differentiates the loss itself, twice.

        Called several times in one pass, the losses add up; ExactGAM then holds the graphs of all of them at once.

        Raises:
            TypeError, RuntimeError: for ExactGAM, a loss that is not one number in a tensor, or a constant.
        """
        self._backward(loss)
