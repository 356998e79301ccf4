"""The passes of one step as an iterator that notices how its loop is left.

A ``for`` loop holds its iterator on the interpreter's stack, which releases it at the moment the loop is left: before
an exception handler runs. So every loop gets its own iterator with a generator in it. The end of the generator is the
end of the loop, even if a name or a traceback holds the result of ``optimizer.passes()``. A generator that has finished
by itself runs no code when it is released, so that no Ctrl-C can be lost in it.
"""

from __future__ import annotations

import ctypes
import dis
import gc
import sys
import threading
import warnings
from collections.abc import Generator, Iterator
from types import CodeType, FrameType, TracebackType
from typing import Any, Protocol

from .amp import LossScale
from .progress import Progress
from .step import OVER, Step
from .turn import Turn


class Owner(Protocol):
    """The part of the optimizer that the passes need."""

    _progress: Progress

    def _begin(self, scale: LossScale | None, *, by_loop: bool) -> Step:
        """Make a step; the parameters are not touched yet."""
        ...

    def step(self) -> object:
        """End the step."""


class _Failed(threading.local):
    """Frame and instruction of the loop in which a step last failed; a ``zip`` around it did not end normally."""

    at: tuple[int, int] | None = None


_failed = _Failed()


class PassDriver:
    """Drives the step of one loop, or of several loops that share its passes."""

    def __init__(self, owner: Owner, scale: LossScale | None) -> None:
        self._owner = owner
        self._scale = scale
        self._step: Step | None = None
        self.ended = False
        self.is_managed = False
        """True if a context manager ends the step."""
        self.is_done = False
        """True once a loop in the context manager has ended."""
        self.loop: object = None
        """The loop that last asked for a pass."""

    def next_pass(self) -> Turn | None:
        """Begin the next pass, or end the step and return None."""
        if self.ended:
            return None
        try:
            if self._step is None:
                self._step = self._owner._begin(self._scale, by_loop=True)
            step = self._step
            if step.phase not in OVER:  # over if step() was called in the last pass
                turn = step.next_pass()
                if turn is not None:
                    return turn
                # The one place where a step calls step(). Schedulers, Accelerate and Lightning wrap that method and
                # count its calls, so this must be the public one. It finds the step complete, and ends it.
                self._owner.step()
        except BaseException as error:
            if not self.undo(error):
                raise
        else:
            self.ended = True
            if step.phase not in OVER:  # a wrapper of step() did not call it
                self.undo()
        return None

    def undo(self, error: BaseException | None = None) -> bool:
        """Undo the step, if it is in progress, because of ``error``; return True if that asks to skip it."""
        self.ended = True
        return self._step is not None and self._step.leave(None, error or GeneratorExit())

    def close(self, error: BaseException | None) -> None:
        """End the step at the end of a context manager."""
        if self._step is None and error is None and not (self.ended or self._owner._progress.left_by):
            warnings.warn(
                "the block of `with optimizer.passes() as turns` ran no pass, and no step was taken: write "
                "`for turn in turns:` in it",
                stacklevel=3,
            )
        step = None if error is not None or self.ended else self._step
        if step is not None and step.in_last_pass and (self.is_done or step.has_gradient):
            self.next_pass()
        self.undo(error)

    def left(self, how: str | None) -> None:
        """Take or undo the step, because its loop has ended.

        Args:
            how: ``"end"`` if an iterator around it has ended, ``"break"``, ``"error"``, or None if it ended earlier.
        """
        step = self._step
        if self.ended or step is None:
            return
        is_done = step.in_last_pass and (how == "end" or (how == "break" and step.has_gradient))
        if is_done and self.is_managed:
            self.is_done = True
            return
        if is_done and how == "end":
            try:
                self.next_pass()
            except Exception as error:  # an error in a finalizer is not visible
                self._owner._progress.fail_later(error, type(self._owner).__name__)
            return
        step.may_communicate = how is not None
        self.undo()
        if is_done:
            warnings.warn(
                "a loop over passes() was left by break or return in its last pass: the step was undone. To take it, "
                "let the loop go on to its end, or call optimizer.step() in the last pass",
                stacklevel=3,
            )
        if how is None and not sys.is_finalizing():
            warnings.warn(
                "a loop over passes() was left while other code still held its iterator, and the parameters were "
                "restored only when that was released: write `with optimizer.passes() as turns:` around the loop",
                stacklevel=3,
            )


class Passes(Iterator[Turn]):
    """The passes of one step, for a loop whose body runs forward and backward once per pass.

    The step is taken when the loop asks for a pass after the last. It is also taken if a loop ends without asking,
    because a ``zip`` or ``islice`` around it ends.

    The step is undone if an exception, ``break`` or ``return`` leaves the loop; in the last pass, after its backward,
    with a warning. An exception handler around the loop finds the parameters as they were.

    One kind of loop cannot be seen to end: over a wrapper with a name (``pairs = enumerate(optimizer.passes())``),
    because the name holds the iterator. Use the context manager there. Use it too if the loop does not ask for a pass
    after the last and you want errors of the update at once::

        with optimizer.passes() as turns:
            pairs = enumerate(turns)
            for i, turn in pairs:
                ...

    At its end it takes the step if the last pass is done, and undoes it otherwise.

    >>> import torch
    >>> from gam_fast import SAM
    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = SAM([weight], torch.optim.SGD, lr=0.25, rho=0.5)
    >>> with optimizer.passes() as turns:
    ...     for batch, turn in zip([1.0, 1.0], turns):
    ...         (batch * weight.square().sum()).backward()
    >>> weight.item()
    0.25
    """

    def __init__(self, drive: PassDriver) -> None:
        self._drive = drive
        self._direct: Iterator[Turn] | None = None

    def __iter__(self) -> Iterator[Turn]:
        return _Loop(self._drive)

    def __next__(self) -> Turn:
        if self._direct is None:
            self._direct = _by_hand(self._drive)
        return next(self._direct)

    def close(self) -> None:
        """Undo the step, if it is in progress."""
        self._drive.undo()

    def __enter__(self) -> Passes:
        self._drive.is_managed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._drive.close(error)


def _by_hand(drive: PassDriver) -> Iterator[Turn]:
    """Yield the passes for calls of ``next()``."""
    try:
        while (turn := drive.next_pass()) is not None:
            yield turn
    except GeneratorExit:
        drive.left(None)


class _Loop(Iterator[Turn]):
    """The passes for one loop; another loop gets its own iterator."""

    __slots__ = ("_drive", "turns")

    def __init__(self, drive: PassDriver) -> None:
        self._drive = drive
        self.turns: Any = _in_loop(drive)

    def __iter__(self) -> Iterator[Turn]:
        return _Loop(self._drive)

    def __next__(self) -> Turn:
        turn: Turn = next(self.turns)
        return turn


def _in_loop(drive: PassDriver) -> Generator[Turn, None, None]:
    """Yield the passes for one loop. Record its position at each request, to find out how it was left."""
    frame = sys._getframe(2)
    code, place, at, mine = frame.f_code, id(frame), frame.f_lasti, object()
    if code.co_varnames[:1] == (".0",):
        _leave_to_the_stack(frame)
    del frame  # the frame holds the loop
    _failed.at = None
    try:
        while True:
            drive.loop = mine
            try:
                turn = drive.next_pass()
            except BaseException:
                _failed.at = place, at
                raise
            if turn is None:
                return
            yield turn
            at = sys._getframe(2).f_lasti
    except GeneratorExit:
        if drive.loop is mine:  # no other loop has continued the passes
            drive.left(_how_left(sys._getframe(1), code, place, at))


def _how_left(frame: FrameType, code: CodeType, place: int, at: int) -> str | None:
    """Find out how the loop was left, ``frame`` being the one that runs: see :meth:`PassDriver.left`.

    While an exception propagates, a frame's position is the instruction that raised it.
    """
    if id(frame) != place or frame.f_code is not code:
        return None
    if frame.f_lasti == at:
        return "error" if _failed.at == (place, at) else "end"
    instruction = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    if instruction.startswith(_NAMED):
        return None
    return "break" if instruction in _BREAK else "error"


_BREAK = ("POP_TOP", "POP_ITER", "END_FOR")
"""The instructions by which ``break`` and ``return`` release the iterator."""

_NAMED = ("STORE_", "DELETE_")
"""The instructions by which a name releases it."""


def _leave_to_the_stack(frame: FrameType) -> None:
    """Take the iterator out of a comprehension's hidden variable, where it would live on in a traceback.

    The loop itself holds it on the stack. (Comprehensions have their own frame up to Python 3.11, generator expressions
    always.)
    """
    loop = sys._getframe(1)
    variables = frame.f_locals
    held: list[Any] = [variables.get(".0")]
    for _ in range(3):  # looks through enumerate(zip(...)) and the like
        if any(isinstance(value, _Loop) and value.turns.gi_frame is loop for value in held):
            break
        held = gc.get_referents(*held)
    else:
        return
    variables[".0"] = None
    if sys.version_info < (3, 13):
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
