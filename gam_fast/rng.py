"""Replay the same random numbers in every pass, so that dropout and stochastic depth draw the same masks.

Otherwise the difference of two gradients of a step, from which GAM takes the curvature, would be mostly noise.

Threads share torch's default generators, and Python's and NumPy's global ones, whose states do not show which thread
has drawn. In a process with several threads the compiled core replays the draws of this thread from torch's CPU
generator, and leaves the generator itself to the other threads. Without the core, and for the other generators, a state
that moves in the first pass is reset in the later ones.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .capture import is_capturing

_GLOBAL = ("random", "numpy.random")


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


def seed(device: torch.device, value: int) -> None:
    """Seed torch's default generator of ``device``, and no other (``torch.manual_seed`` seeds those of all devices)."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(value)
        return
    module = _device_module(device)
    with module.device(device) if hasattr(module, "device") else nullcontext():
        module.manual_seed(value)


def global_modules() -> list[Any]:
    """Return the modules with Python's and NumPy's global generators; not NumPy if nobody has imported it."""
    return [sys.modules[name] for name in _GLOBAL if name in sys.modules]


@contextmanager
def kept(devices: Iterable[torch.device], generators: Iterable[Any] = ()) -> Iterator[None]:
    """Restore at the end of the block torch's generators of ``devices``, Python's and NumPy's, and the given ones."""
    sources = [*map(_Source.of_device, devices), *map(_source_of, [*global_modules(), *generators])]
    states = [source.get() for source in sources]
    try:
        yield
    finally:
        for source, state in zip(sources, states, strict=True):
            source.set(state)


def _same(one: Any, other: Any) -> bool:
    """Return whether two states of a generator are the same; NumPy's are dicts that may hold arrays."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_same(value, other[key]) for key, value in one.items())
    return bool(one.tobytes() == other.tobytes() if hasattr(one, "tobytes") else one == other)


class _Source:
    """A generator to replay: functions to read and set its state, and the states of a step."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        self.get = get
        self.set = put
        self.start: Any = None
        self.moves = True  # whether passes reset it
        self.after: Any = None  # its state between passes, for code that draws from it there
        self.last: Any = None  # its state after the newest pass, if the last pass counts
        self.after_reading: Any = None

    @classmethod
    def of_device(cls, device: torch.device) -> _Source:
        if device.type == "cpu":  # saves a function call, twice per pass
            return cls(torch.default_generator.get_state, torch.default_generator.set_state)
        module = _device_module(device)
        if device.type == "mps":
            return cls(module.get_rng_state, module.set_rng_state)
        return cls(partial(module.get_rng_state, device), lambda state: module.set_rng_state(state, device))

    @classmethod
    def of(cls, generator: Any) -> _Source | None:
        """Wrap a generator of torch, NumPy or Python, or one of the modules ``random`` and ``numpy.random``."""
        if isinstance(generator, torch.Generator):
            return cls(generator.get_state, generator.set_state)
        if hasattr(generator, "getstate") and hasattr(generator, "setstate"):
            return cls(generator.getstate, generator.setstate)
        if hasattr(generator, "get_state") and hasattr(generator, "set_state"):  # numpy.random and its RandomState
            return cls(partial(generator.get_state, legacy=False), generator.set_state)
        bits = getattr(generator, "bit_generator", generator)
        if hasattr(bits, "state") and hasattr(bits, "random_raw"):
            return cls(partial(getattr, bits, "state"), partial(setattr, bits, "state"))
        return None

    def note_start(self) -> None:
        self.start = self.get()
        self.moves = True
        self.after = self.last = self.after_reading = None

    def was_drawn(self, alone: bool) -> bool:
        """Return whether to replay it. Without other threads, resetting an unmoved state does no harm."""
        return alone or not _same(self.start, self.after)


class _Ambient(_Source):
    """The global generator of Python or of NumPy, from which most bodies never draw.

    Reading its state takes 14 µs and 60 µs. Until a step has drawn from it, at most a hundredth of the time is spent on
    this: all steps of 15 ms or more are checked, and always the first one.
    """

    def __init__(self, name: str) -> None:
        super().__init__(lambda: None, lambda state: None)
        self._name = name
        self._is_drawn = False
        self._due = self._cost = 0.0

    def is_due(self) -> bool:
        """Return whether this step checks it. A package that was not imported is not checked."""
        if not self._is_drawn and time.perf_counter() < self._due:
            return False
        source = _Source.of(sys.modules.get(self._name))
        if source is None:
            return False
        self.get, self.set = source.get, source.set
        return True

    def note_start(self) -> None:
        since = time.perf_counter()
        super().note_start()
        self._cost = time.perf_counter() - since

    def was_drawn(self, alone: bool) -> bool:
        since = time.perf_counter()
        found = not _same(self.start, self.after)
        if found and not alone:
            time.sleep(1e-4)
            found = _same(self.after, self.get())  # otherwise another thread draws, which is rare
        self._is_drawn = self._is_drawn or found  # stays true: Mixup may draw in some steps only
        now = time.perf_counter()
        self._due = now + 100.0 * (2.0 * self._cost + now - since)
        return found


_steps: set[int] = set()
"""The ids of the :class:`ReplayRNG` of all steps in progress."""


@cache
def _draws() -> Callable[[], Any] | None:
    """Return the compiled core's ``Draws``, which tells draws of this thread from those of others, or None."""
    try:
        from .backends.native import NativeBackend
    except ImportError:
        return None
    return getattr(NativeBackend.core, "Draws", None)  # older builds of the core lack it


class ReplayRNG:
    """Replays generators: torch's default ones of the CPU and of ``devices``, the user's, Python's and NumPy's.

    As a context manager it spans one step, and serves one step after the other. Call :meth:`begin` at the start of each
    pass and :meth:`end` at its end. Every pass starts from the state at entry. After the step, the state is that at the
    end of the first pass, as if it had been the only one (with ``begin(keep_last=True)``, that of the last pass, if it
    drew anything). If the block raises, the state at entry is restored. A generator that no pass draws from is not set,
    so that other threads may draw from it.

    Put draws that only the first pass makes, because it reads data for all passes, into a block of :meth:`reading`. The
    later passes call :meth:`skip_reading` at that point.

    Args:
        devices: accelerators whose generators are replayed too.
        generators: the user's generators: ``torch.Generator``, ``numpy.random.Generator``, ``random.Random`` and
            similar.

    Raises:
        TypeError: an entry of ``generators`` is not a generator, or its state cannot be set.
        RuntimeError: inside a CUDA graph capture, where generators cannot be read or set.

    >>> with ReplayRNG() as replay:
    ...     draws = []
    ...     for _ in range(3):
    ...         replay.begin()
    ...         draws.append(float(torch.rand(())))
    >>> len(set(draws))
    1
    """

    def __init__(self, devices: Iterable[torch.device] = (), generators: Iterable[Any] = ()) -> None:
        self.generators = list(generators)
        self._own = [_source_of(generator) for generator in self.generators]
        self._ambient = list(map(_Ambient, _GLOBAL))
        self._sources: list[_Source] | None = None
        self._replayed: list[_Source] = []
        self._apart: Any = None
        self.prepare(devices)

    def __reduce__(self) -> tuple[type[ReplayRNG], tuple[tuple[()], list[Any]]]:
        return ReplayRNG, ((), self.generators)

    @classmethod
    def wanted(cls, option: Any) -> ReplayRNG | None:
        """Make one from an optimizer's ``replay_rng=``: True, False, or further generators to replay.

        Raises:
            TypeError: anything else.
        """
        if hasattr(option, "__iter__"):
            return cls(generators=option)
        if _Source.of(option) is not None:
            raise TypeError(f"replay_rng= takes a list of generators, got one: write replay_rng=[{option!r}]")
        return cls() if option else None

    def prepare(self, devices: Iterable[torch.device]) -> None:
        """Choose the generators of these devices, and the CPU's."""
        self._devices = list(devices)
        accelerators = sorted({d for d in self._devices if d.type not in ("cpu", "meta")}, key=str)
        self.devices = [torch.device("cpu"), *accelerators]
        self._torch = [_Source.of_device(device) for device in self.devices]

    def __enter__(self) -> ReplayRNG:
        self.start(self._devices, capturing=is_capturing(self.devices))
        return self

    def start(self, devices: list[torch.device], *, capturing: bool, several: bool = True) -> None:
        """Begin a step, as ``with`` does.

        Args:
            devices: as for the constructor.
            capturing: whether a CUDA graph is being captured.
            several: whether there may be several passes.
        """
        if capturing:
            raise RuntimeError(
                "random numbers cannot be replayed inside a CUDA graph capture: construct the optimizer with "
                "replay_rng=False, which is exact for a model without dropout or other randomness"
            )
        if devices != self._devices:
            self.prepare(devices)
        self._several = several
        self._alone = not _steps and threading.active_count() == 1
        _steps.add(id(self))
        self._sources = None
        self._replayed = []
        self._in_pass = self._looked = self._keep_last = self._is_after_reading = False
        draws = None if self._alone else _draws()
        self._apart = draws() if draws is not None else None

    def begin(self, *, keep_last: bool = False) -> None:
        """Start a pass from the state at entry.

        Args:
            keep_last: whether the end of the last pass counts, as known by now; once true, it stays so.
        """
        if self._in_pass:
            self.end()
        self._keep_last = keep_last
        self._is_after_reading = False
        self._in_pass = True
        if self._apart is not None:
            self._apart.begin()
        if self._sources is None:
            self._sources = [*self._torch, *self._own, *filter(_Ambient.is_due, self._ambient)]
            for source in self._sources:
                source.note_start()
            return
        for source in self._replayed:
            if not self._alone:  # other threads have drawn since, or reset it for a step of their own
                source.after = source.get()
                source.moves = not _same(source.after, source.start)
            if source.moves:
                source.set(source.start)

    def end(self, *, goes_on: bool = False) -> None:
        """End a pass: set the generators to where they would be after the first pass alone.

        Args:
            goes_on: whether the next pass begins before any other code in this thread draws from them.
        """
        if not self._in_pass:
            return
        self._in_pass = False
        if self._apart is not None:
            self._apart.end()
        if not self._looked:
            self._look()
            return
        for source in self._replayed:
            source.last = source.get() if self._keep_last else None
            if source.moves and not (goes_on and self._alone):
                source.set(source.after)

    def _look(self) -> None:
        """Find out which generators the first pass has drawn from."""
        self._looked = True
        for i, source in enumerate(self._sources or ()):
            if i == 0 and self._apart is not None:
                continue
            if self._several or not self._alone or isinstance(source, _Ambient):
                source.after = source.get()
            if source.was_drawn(self._alone):
                self._replayed.append(source)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Mark draws, in the first pass, that the later passes do not repeat."""
        sources = self._sources or ()
        before = [source.get() for source in sources]
        if self._apart is not None:
            self._apart.pause()
        try:
            yield
        finally:
            if self._apart is not None:
                self._apart.resume()
        for source, state in zip(sources, before, strict=True):
            after = source.get()
            if not _same(state, after):
                source.after_reading = after
        self._is_after_reading = True

    def skip_reading(self) -> None:
        """Continue, in a later pass, from where the first pass was after :meth:`reading`."""
        if not self._is_after_reading:
            self._is_after_reading = True
            for source in self._replayed:
                if source.after_reading is not None:
                    source.set(source.after_reading)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.exit(undo=kind is not None)

    def exit(self, *, undo: bool) -> None:
        """End a step; with ``undo``, restore the state at entry."""
        _steps.discard(id(self))
        if self._sources is not None:
            if self._in_pass:
                self.end()
            for source in self._replayed:
                if undo:
                    source.set(source.start)
                elif source.last is not None:
                    is_read = self._is_after_reading and source.after_reading is not None
                    if not _same(source.last, source.after_reading if is_read else source.start):
                        source.set(source.last)
            if self._apart is not None:
                if not undo and self._keep_last:
                    self._apart.keep()
                elif undo and self._apart.can_undo():
                    self._sources[0].set(self._sources[0].start)
        self._sources = self._apart = None
        self._replayed = []


def _source_of(generator: Any) -> _Source:
    source = _Source.of(generator)
    if source is not None:
        with suppress(NotImplementedError, TypeError):  # random.SystemRandom, for example
            source.get()
            return source
    raise TypeError(
        "replay_rng= takes True, False or a list of generators whose state can be read and set (torch.Generator, "
        f"numpy.random.Generator, random.Random), got {generator!r}"
    )
