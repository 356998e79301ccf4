"""What the body of the loop over ``passes()`` gets: which pass it is, and which part of the batch it wants."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from types import FunctionType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .rows import leading, rows_of


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
        self._taken: list[tuple[int, int]] = []
        self._taken_before: list[tuple[int, int]] = []

    def begin(self) -> None:
        """Before a pass."""
        self.weight = 1.0
        self._taken_before, self._taken = self._taken, []

    def cut(self, what: str) -> None:
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
        self.cut("rows")
        return self._take(n, share)

    def rows(self, batch: Any, share: float) -> Any:
        """See :meth:`Turn.rows`."""
        self.cut("rows")
        if share < 1.0:
            return leading(batch, lambda n: self._take(n, share))
        if self._taken_before:
            self._take(rows_of(batch), share)
        return batch

    def _take(self, n: int, share: float) -> int:
        """As :meth:`count`, for a batch that is to be as long as it was in the pass before."""
        keep = _part(n, share)
        at = len(self._taken)
        if at < len(self._taken_before):
            offered, kept = self._taken_before[at]
            if n == kept < offered:
                raise RuntimeError(
                    f"a batch of {n} rows in this pass, which is what the pass before kept of {offered}: each pass "
                    "takes its rows from the whole batch, so leave that as it is: xb, yb = turn.rows(x, y)"
                )
        self._taken.append((n, keep))
        return keep

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches of a step's only pass, each read when it is asked for."""
        self.cut("batches")
        return some(batches)

    def batches(self, batches: Sequence[Any], share: float) -> Sequence[Any]:
        """The micro-batches that a pass sees; their gradients are then weighted as those of all."""
        self.cut("batches")
        kept = batches[: _part(len(batches), share)]
        self.weight = len(batches) / len(kept)
        return kept


def some(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches, none of which is held here.

    Raises:
        ValueError: there is none.
    """
    iterator = iter(batches)
    first = list(islice(iterator, 1))
    if first:
        yield first.pop()
        yield from chain(iterator)  # which is not closed when this is
        return
    raise ValueError("micro_batches() got none: the loader is at its end, or is an iterator that was read before")


def _part(n: int, share: float) -> int:
    return min(n, max(1, math.floor(share * n + 0.5)))


class Turn:
    """One pass of a step, as :meth:`SharpnessAwareOptimizer.passes` yields it.

    Attributes:
        index: 0 for the pass at θ, then 1, 2, ….
        passes: how many there are; with :class:`gam_fast.active.WhenSteep`, how many there are at most, until the
            gradient of the first has decided it.
    """

    __slots__ = ("_backward", "_portion", "_share", "index", "passes")

    def __init__(
        self,
        index: int,
        passes: int,
        share: float = 1.0,
        backward: Callable[[Tensor], None] = Tensor.backward,
        portion: Portion | None = None,
    ) -> None:
        self.index = index
        self.passes = passes
        self._share = share
        self._backward = backward
        self._portion = Portion(1.0) if portion is None else portion

    def __repr__(self) -> str:
        return f"Turn(index={self.index}, passes={self.passes}, share={self._share})"

    @property
    def share(self) -> float:
        """The part of the batch that this pass is to see: ``ascent_share`` of the optimizer, and 1.0 in the last.

        Who reads it is taken to go by it, as one who calls :meth:`rows` or :meth:`count`.

        >>> Turn(0, 2, share=0.25)
        Turn(index=0, passes=2, share=0.25)
        """
        if self._share < 1.0:
            self._portion.asked = True
        return self._share

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

        Returns what it was given, a tuple where it was given several. Nothing is copied. Leave the batch as it is
        (``xb, yb = turn.rows(x, y)``): the next pass takes its rows from it.

        Raises:
            ValueError: tensors of different lengths, a list that is not one entry a row, a list of examples.
            TypeError: nothing that has rows, or what cannot be cut, such as a sparse tensor.
            RuntimeError: the step iterates over :meth:`SharpnessAwareOptimizer.micro_batches`, which are cut already;
                the batch is what the pass before kept of it.

        >>> import torch
        >>> Turn(0, 2, share=0.25).rows(torch.arange(8), {"weight": torch.ones(8, 3)})
        (tensor([0, 1]), {'weight': tensor([[1., 1., 1.],
                [1., 1., 1.]])})
        """
        if not batch:
            raise TypeError("turn.rows() needs the batch: xb, yb = turn.rows(x, y)")
        found = self._portion.rows(batch, self._share)
        return found[0] if len(batch) == 1 else found

    def count(self, n: int) -> int:
        """How many of ``n`` rows this pass is to see: for batches that :meth:`rows` does not know how to cut.

        The nearest whole number to ``share · n``, at least 1. Raises RuntimeError as :meth:`rows` does.

        >>> Turn(0, 4, share=0.25).count(10), Turn(3, 4).count(10)
        (3, 10)
        """
        return self._portion.count(n, self._share)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, for a loop that serves every method: ExactGAM differentiates the loss itself, twice.

        Called several times in one pass, the losses add up; ExactGAM then holds the graphs of all of them at once.

        Raises:
            TypeError, RuntimeError: for ExactGAM, a loss that is not one number in a tensor, or a constant.
        """
        self._backward(loss)


def first_pass(optimizer: torch.optim.Optimizer) -> bool:
    """Tell the first pass of a step from the others, for logging and metrics in code that is called once a pass.

    True in the first pass and outside a step, where the weights are not perturbed, and always for an optimizer that is
    not of gam_fast. Wrappers (of Lightning, Fabric and Accelerate) are looked into.

    Raises:
        TypeError: not an optimizer, such as the list that ``self.optimizers()`` of Lightning is for several of them.

    >>> import torch, gam_fast
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1)
    >>> for turn in optimizer.passes():
    ...     weight.sum().backward()
    ...     print(first_pass(optimizer))
    True
    False
    >>> first_pass(optimizer), first_pass(torch.optim.SGD([weight], lr=0.1))
    (True, True)
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"first_pass() takes one optimizer, got {optimizer!r}")
    inner: Any = optimizer
    while not hasattr(inner, "turn") and isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    turn = getattr(inner, "turn", None)
    return turn is None or turn.index == 0


Loss = TypeVar("Loss", covariant=True)


class TurnClosure(Protocol[Loss]):
    """A closure that is given the turn."""

    def __call__(self, turn: Turn) -> Loss:
        """The loss in this pass."""


def evaluation(closure: Any) -> Callable[[Turn], Any]:
    """The closure as a function of the turn, which it gets if it requires an argument of that name, and no other.

    Raises:
        TypeError: it cannot be called, or requires other arguments.

    >>> evaluation(lambda: "loss")(Turn(0, 2)), evaluation(lambda turn, scale=2: turn.passes * scale)(Turn(0, 2))
    ('loss', 4)
    """
    if not callable(closure):
        hint = ", not the loss: def closure(): loss = …; loss.backward(); return loss" * isinstance(closure, Tensor)
        raise TypeError(
            f"step() takes a closure{hint}; got {type(closure).__name__}. The loop form is "
            "`for turn in optimizer.passes(): criterion(model(x), y).backward()`"
        )
    if type(closure) is FunctionType and not hasattr(closure, "__wrapped__"):  # what follows takes 20 µs
        code = closure.__code__
        if not code.co_kwonlyargcount and not code.co_flags & inspect.CO_VARARGS:
            return _bound(closure, code.co_varnames[: code.co_argcount - len(closure.__defaults__ or ())])
    try:
        parameters = inspect.signature(closure, follow_wrapped=False).parameters.values()
        forwards = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if forwards:  # of a decorator: what it decorates has the arguments, some of which it may give itself
            parameters = inspect.signature(closure).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return lambda turn: closure()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if forwards:
        return closure if "turn" in (p.name for p in needed) else lambda turn: closure()
    if [p.name for p in needed if p.kind is p.KEYWORD_ONLY] == ["turn"] and len(needed) == 1:
        return lambda turn: closure(turn=turn)
    return _bound(closure, [p.name for p in needed])


def _bound(closure: Callable[..., Any], needed: Sequence[str]) -> Callable[[Turn], Any]:
    if not needed:
        return lambda turn: closure()
    if list(needed) == ["turn"]:
        return closure
    raise TypeError(
        f"the closure needs {', '.join(needed)}, but is called without arguments, or with the pass where it needs one "
        "argument and calls it turn: give the others a default (x=x), or bind them by functools.partial"
    )


def frames_of_libraries() -> int:
    """The ``stacklevel`` at which a warning points at the user's code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


_LIBRARIES = ("gam_fast", "torch", "contextlib")
