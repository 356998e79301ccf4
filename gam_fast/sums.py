"""The sums of a step: over the leaves of a device by its backend, over devices, and over processes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import scalars
from .backends.base import Direction, PerGroup, Products, Scalar, TensorList
from .parameters import ParameterBlock, StepParameters
from .recipes import Perturbation
from .sharded import add_up_over_processes


class Sums:
    """Norms and inner products over all parameters that take part, whatever they are spread over.

    Args:
        blocks: those parameters.
        groups: how many parameter groups there are.

    Attributes:
        on_host: whether a sum is a plain number, because reading it waits for nothing.
    """

    def __init__(self, blocks: StepParameters, groups: int) -> None:
        self.on_host = blocks.on_host
        self._blocks = blocks
        self._groups = groups

    def square_norm(self, vector: int) -> Scalar:
        """‖g‖² of a vector that is held."""
        return self._add_up([s.backend.square_norm(s.leaves, s.grads[vector]) for s in self._blocks.all])

    def square_length(self, move: Perturbation, eta: list[float] | None) -> Scalar:
        """The square of the norm that a move is divided by."""
        minus = move.minus
        s = self._blocks.only
        if s is not None and self.on_host and not self._blocks.sharded:
            return float(
                s.backend.square_norm(s.leaves, s.grads[move.along], None if minus is None else s.grads[minus], eta)
            )
        return self._add_up(
            [
                s.backend.square_norm(s.leaves, s.grads[move.along], None if minus is None else s.grads[minus], eta)
                for s in self._blocks.all
            ]
        )

    def inner_products(
        self,
        terms: Sequence[tuple[ParameterBlock, list[TensorList]]],
        u: Sequence[PerGroup],
        m: Sequence[PerGroup] | None = None,
    ) -> Products:
        """The products of combinations of each block's terms: the coefficients ``u`` and ``m`` by term and group."""
        tables: list[Tensor] = []
        for block, own in terms:
            of_m = None if m is None else Direction(own, m)
            tables.append(block.backend.inner_products(block.leaves, Direction(own, u), of_m, self._groups))
        if len(tables) == 1 and self.on_host and not self._blocks.sharded:
            found: Products = tables[0].tolist()
            return found
        return scalars.inner_products(self._over_processes(tables), self.on_host)

    def _add_up(self, squares: list[Tensor]) -> Scalar:
        if len(squares) == 1 and self.on_host and not self._blocks.sharded:
            return float(squares[0])
        return scalars.square_norm(self._over_processes(squares), self.on_host)

    def _over_processes(self, sums: list[Tensor]) -> list[Tensor]:
        if not self._blocks.sharded:
            return sums
        return add_up_over_processes(sums, [block.layout for block in self._blocks.all])
