"""One pass as the loop's body sees it: its index, and its part of the batch."""

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
    """The part of the batch that a step's passes before the last see, and whether any code has asked for it.

    Args:
        share: this part, above 0 and at most 1.

    Attributes:
        asked: whether a pass of several has asked for its part of the batch.
        weight: the factor for the gradient of the pass in progress, so that it counts as that of all micro-batches.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.asked = False
        self.weight = 1.0
        self._cuts: str | None = None
        self._taken: list[tuple[int, int]] = []
        self._taken_before: list[tuple[int, int]] = []

    def begin(self) -> None:
        """Prepare for a pass."""
        self.weight = 1.0
        self._taken_before, self._taken = self._taken, []

    def cut(self, what: str) -> None:
        """Record a request. A batch is cut by rows or by micro-batches, in the same way in all passes."""
        self.asked = True
        if self.share < 1.0 and self._cuts not in (None, what):
            raise RuntimeError(
                "turn.rows() or turn.count() in a step that iterates over micro_batches(), which are a share of the "
                "batch already: leave one of them out"
            )
        self._cuts = what

    def count(self, n: int, share: float) -> int:
        """Return how many of ``n`` rows a pass sees: the integer nearest to ``share · n``, at least 1."""
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
        """Do the work of :meth:`count`; refuse a batch that the previous pass has already cut."""
        keep = _part(n, share)
        at = len(self._taken)
        if at < len(self._taken_before):
            offered, kept = self._taken_before[at]
            if n == kept < offered:
                raise RuntimeError(
                    f"a batch of {n} rows in this pass, the part that the pass before kept of {offered}: each pass "
                    "takes its rows from the whole batch, so leave that as it is: xb, yb = turn.rows(x, y)"
                )
        self._taken.append((n, keep))
        return keep

    def stream(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Return the micro-batches of a step's only pass; each is read when it is asked for."""
        self.cut("batches")
        return some(batches)

    def batches(self, batches: Sequence[Any], share: float) -> Sequence[Any]:
        """Return the micro-batches that a pass sees, and set the weight of its gradient."""
        self.cut("batches")
        kept = batches[: _part(len(batches), share)]
        self.weight = len(batches) / len(kept)
        return kept


def some(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches without holding any of them.

    Raises:
        ValueError: there are no batches.
    """
    iterator = iter(batches)
    first = list(islice(iterator, 1))
    if first:
        yield first.pop()
        yield from chain(iterator)  # chain() keeps the iterator open when this generator is closed
        return
    raise ValueError("micro_batches() got none: the loader is at its end, or is an iterator that was read before")


def _part(n: int, share: float) -> int:
    return min(n, max(1, math.floor(share * n + 0.5)))


class Turn:
    """One pass of a step, as :meth:`SharpnessAwareOptimizer.passes` yields it.

    Attributes:
        index: 0 for the pass at θ, then 1, 2, ….
        passes: the number of passes in this step. With :class:`gam_fast.active.WhenSteep` it is an upper bound in the
            first pass, whose gradient decides.

    >>> import torch, gam_fast
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> optimizer = gam_fast.SAM([weight], torch.optim.SGD, lr=0.1, ascent_share=0.5)
    >>> for turn in optimizer.passes():
    ...     x = turn.rows(torch.ones(8, 1))
    ...     turn.backward((x * weight).sum())
    ...     print(turn.index, turn.last, len(x))
    0 False 4
    1 True 8
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
        """The part of the batch that this pass sees: the optimizer's ``ascent_share``, and 1.0 in the last pass.

        Reading this counts as using the share, like a call of :meth:`rows` or :meth:`count`.

        >>> Turn(0, 2, share=0.25)
        Turn(index=0, passes=2, share=0.25)
        """
        if self._share < 1.0:
            self._portion.asked = True
        return self._share

    @property
    def last(self) -> bool:
        """True if this is the last pass of the step."""
        return self.index == self.passes - 1

    def rows(self, *batch: Any) -> Any:
        """Return the leading rows of the batch that this pass sees; all of them in the last pass.

        Args:
            batch: tensors or arrays, or mappings, lists, tuples or dataclasses of them. All tensors and arrays have the
                same number ``n`` of rows. The first ``share · n`` of them, rounded, are taken, but at least one.
                (BatchNorm over rows needs two: mind the last batch of an epoch, or let the loader drop it.) A list of
                tensors consists of the parts of a batch, as a ``DataLoader`` collates it; a list without tensors has
                one entry per row.

        Returns:
            The cut batch: one object for one argument, a tuple for several. Nothing is copied. Do not overwrite the
            batch itself (``xb, yb = turn.rows(x, y)``): the next pass takes its rows from it.

        Raises:
            ValueError: tensors of different lengths; a list whose length is not the number of rows; a list of examples.
            TypeError: nothing has rows, or an object cannot be cut, such as a sparse tensor.
            RuntimeError: the step iterates over :meth:`SharpnessAwareOptimizer.micro_batches`, which are already cut;
                or the batch is the part that the previous pass kept of it.

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
        """Return how many of ``n`` rows this pass sees, for batches that :meth:`rows` cannot cut.

        The result is the integer nearest to ``share · n``, at least 1. Raises RuntimeError as :meth:`rows` does.

        >>> Turn(0, 4, share=0.25).count(10), Turn(3, 4).count(10)
        (3, 10)
        """
        return self._portion.count(n, self._share)

    def backward(self, loss: Tensor) -> None:
        """Call ``loss.backward()``; for ExactGAM, hand over the loss, which the optimizer differentiates twice.

        So one loop serves every method. The losses of several calls in one pass add up; ExactGAM holds all their graphs
        at once.

        Raises:
            TypeError, RuntimeError: for ExactGAM, the loss is not a tensor of one element, or is constant.
        """
        self._backward(loss)


def first_pass(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this is the first pass of a step, for logging and metrics in code that runs once per pass.

    The result is True in the first pass and outside a step, where the weights are not perturbed, and always for other
    packages' optimizers. Wrappers (of Lightning, Fabric and Accelerate) are looked through.

    Raises:
        TypeError: not an optimizer, but, for example, the list that Lightning's ``self.optimizers()`` returns.

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
    """A closure that takes the turn as its argument."""

    def __call__(self, turn: Turn) -> Loss:
        """Return the loss in this pass."""


def evaluation(closure: Any) -> Callable[[Turn], Any]:
    """Return the closure as a function of the turn, which it gets if ``turn`` is its only required argument.

    Raises:
        TypeError: the closure cannot be called, or requires other arguments.

    >>> evaluation(lambda: "loss")(Turn(0, 2)), evaluation(lambda turn, scale=2: turn.passes * scale)(Turn(0, 2))
    ('loss', 4)
    """
    if not callable(closure):
        hint = ", not the loss: def closure(): loss = …; loss.backward(); return loss" * isinstance(closure, Tensor)
        raise TypeError(
            f"step() takes a closure{hint}; got {type(closure).__name__}. The loop form is "
            "`for turn in optimizer.passes(): criterion(model(x), y).backward()`"
        )
    if type(closure) is FunctionType and not hasattr(closure, "__wrapped__"):  # the general case takes 20 µs
        code = closure.__code__
        if not code.co_kwonlyargcount and not code.co_flags & inspect.CO_VARARGS:
            return _bound(closure, code.co_varnames[: code.co_argcount - len(closure.__defaults__ or ())])
    try:
        parameters = inspect.signature(closure, follow_wrapped=False).parameters.values()
        forwards = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if forwards:  # a decorator: the decorated function has the arguments, and the decorator may supply some
            parameters = inspect.signature(closure).parameters.values()
    except (TypeError, ValueError):  # a builtin has no signature
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
    """Return the ``stacklevel`` at which a warning points at the user's code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level


_LIBRARIES = ("gam_fast", "torch", "contextlib")
