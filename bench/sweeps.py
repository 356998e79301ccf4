"""Sweeps: the time of the optimizer's part of a step, as parameters, tensors or threads grow.

At each point these contenders take turns: GAM on the requested backend, on the eager one and as a plain loop, and
torch's fused base optimizer. :mod:`bench.contenders` defines the measured time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gam_fast import backends

from .contenders import Contender, measure
from .memory import available
from .models import Shapes, like_resnet, numel, quick, resnet50

LISTS_HELD = {"SGD": 4, "AdamW": 5}
"""Lists of the parameters' size that a contender holds between steps: parameters, source, gradients, state."""

LISTS_MOVED = 6
"""Lists that the plain loop, the contender with the most memory, makes during a step, plus one."""

SHARE = 0.9
"""Usable share of the available memory."""

ELEMENTS = 64
"""Elements per tensor in the sweep of tensors."""


@dataclass(frozen=True)
class Setting:
    """Options that all points share."""

    device: str = "cpu"
    base: str = "SGD"
    dtype: torch.dtype = torch.float32
    backend: str = "auto"
    threads: int = 2
    repeats: int = 7
    quick: bool = False

    @property
    def gam(self) -> str:
        """The table's name of GAM on the requested backend."""
        return f"GAM {backends.select(self.backend, torch.device(self.device)).name}"

    @property
    def reference(self) -> str:
        """The table's name of torch's own optimizer."""
        return f"torch {self.base}"

    def contenders(self, shapes: Shapes) -> dict[str, Contender]:
        """Return the contenders by their names in the table."""
        entries = {
            self.gam: ("GAM", self.backend),
            EAGER: ("GAM", "eager"),
            PLAIN: ("plain-gam", "auto"),
            self.reference: ("torch", "auto"),
        }
        return {
            label: Contender(method, self.base, shapes, self.device, self.dtype, backend)
            for label, (method, backend) in entries.items()
        }


EAGER = "GAM eager"
PLAIN = "plain GAM"


@dataclass(frozen=True)
class Point:
    """The time of one contender at one point of a sweep.

    Attributes:
        label: the contender.
        x: parameters, tensors or threads.
        ms: median.
        spread: half of the range from 5 to 95 % of the times, in percent of the median.
    """

    label: str
    x: int
    ms: float
    spread: float


@dataclass
class Sweep:
    """The growing quantity, the measured points, and the range of the fit.

    Attributes:
        name: the growing quantity.
        what: the fixed settings, in words.
        low, high: the range of the fit.
        points: in the order of measurement.
        left_out: points that were not measured, and the reason.
    """

    name: str
    what: str
    low: float
    high: float
    points: list[Point]
    left_out: str = ""

    @property
    def labels(self) -> list[str]:
        """The names of the contenders."""
        return list(dict.fromkeys(point.label for point in self.points))

    def of(self, label: str) -> tuple[list[int], list[float]]:
        """Return x and milliseconds of one contender."""
        found = [(point.x, point.ms) for point in self.points if point.label == label]
        return [x for x, _ in found], [ms for _, ms in found]

    def at(self, label: str, x: int) -> float:
        """Return the milliseconds of one contender at ``x``."""
        return next(point.ms for point in self.points if (point.label, point.x) == (label, x))


def bytes_needed(elements: int, setting: Setting) -> int:
    """Return the peak memory of a point in bytes."""
    lists = LISTS_HELD[setting.base] * len({setting.gam, EAGER, PLAIN, setting.reference}) + LISTS_MOVED
    return lists * elements * setting.dtype.itemsize


def timed(contenders: dict[str, Contender], x: int, repeats: int) -> Iterator[Point]:
    """Measure all contenders at ``x``."""
    measure(list(contenders.values()), repeats)
    for label, contender in contenders.items():
        yield Point(label, x, contender.median, contender.spread.percent)
        contender.ms.clear()


def parameters(setting: Setting) -> Sweep:
    """Sweep over the number of elements in 100 tensors, up to the available memory."""
    sizes = [10_000, 30_000, 100_000] if setting.quick else [k * 10**e for e in (5, 6, 7) for k in (1, 3)] + [10**8]
    room = SHARE * available(setting.device)
    fitting = [size for size in sizes if bytes_needed(size, setting) <= room]
    sweep = Sweep("parameters", "in 100 tensors", *((1e4, 1e5) if setting.quick else (1e6, 1e8)), points=[])
    if rest := sizes[len(fitting) :]:
        sweep.left_out = (
            f"{', '.join(f'{size:.0e}' for size in rest)} parameters: {rest[0]:.0e} need "
            f"{bytes_needed(rest[0], setting) / 1e9:.1f} GB, and {room / 1e9:.1f} GB may be taken"
        )
    for size in fitting:
        sweep.points += timed(setting.contenders(like_resnet(size)), size, setting.repeats)
    return sweep


def tensors(setting: Setting) -> Sweep:
    """Sweep over the number of tensors of 64 elements each."""
    counts = [10, 30, 100] if setting.quick else [10, 30, 100, 300, 1000, 3000, 10_000]
    sweep = Sweep("tensors", f"of {ELEMENTS} elements", *((10, 100) if setting.quick else (100, 10_000)), points=[])
    for count in counts:
        sweep.points += timed(setting.contenders([(ELEMENTS,)] * count), count, setting.repeats)
    return sweep


def thread_counts(threads: int) -> list[int]:
    """Return 1, 2, 4 …, the number of usable cores, and the requested number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({threads, cores, *(1 << k for k in range(cores.bit_length()))})


def threads(setting: Setting) -> Sweep:
    """Sweep over the number of threads on the parameters of a ResNet-50."""
    shapes = quick(resnet50()) if setting.quick else resnet50()
    counts = thread_counts(setting.threads)
    what = f"on the {len(shapes)} tensors of a ResNet-50, {numel(shapes) / 1e6:.1f} M elements"
    sweep = Sweep("threads", what, 1, max(counts), points=[])
    contenders = setting.contenders(shapes)
    for count in counts:
        torch.set_num_threads(count)
        sweep.points += timed(contenders, count, setting.repeats)
    torch.set_num_threads(setting.threads)
    return sweep


SWEEPS: dict[str, Callable[[Setting], Sweep]] = {f.__name__: f for f in (parameters, tensors, threads)}
