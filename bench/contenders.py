"""Optimizers that take turns within one run, and the time of their steps without the closure."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gam_fast

from .clock import clock, keep_busy, synchronize
from .models import Shapes
from .peers import PEERS
from .rounds import rounds
from .spread import Spread

HYPER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4},
    "AdamW": {"lr": 1e-3, "weight_decay": 1e-2},
}
"""Hyper-parameters of the base optimizers."""

FLOOR = {
    "SGD": {"torch": 5, "Base": 5, "SAM": 10, "GSAM": 13, "GAM": 27},
    "AdamW": {"torch": 7, "Base": 7, "SAM": 12, "GSAM": 15, "GAM": 29},
}
"""Reads and writes per element of a fully fused step, by base optimizer and method."""


LONGEST = 0.01
"""Seconds that a GPU is kept busy at most before a part of a step; about a thousand launches can wait meanwhile."""


class Contender:
    """One optimizer over its own parameters, and the milliseconds of its steps.

    On a GPU these are the device's own, by events; the device gets work before each step, so that launches queue up.
    Non-finite gradients are ignored there, because checking them waits for the device.

    Args:
        method: a class of gam_fast, a key of :data:`bench.peers.PEERS`, or ``"torch"`` for the base optimizer of torch
            alone, fused.
        base: ``"SGD"`` or ``"AdamW"``.
        backend: backend of gam_fast.
    """

    def __init__(
        self,
        method: str,
        base: str,
        shapes: Shapes,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "auto",
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.method, self.base, self.dtype, self.backend = method, base, dtype, backend
        self.device = device

        def tensors() -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]

        self.params = [torch.nn.Parameter(tensor) for tensor in tensors()]
        self.source = tensors()
        self.optimizer: Any  # torch's annotation does not allow closures that return a tensor
        base_class = getattr(torch.optim, base)
        if method == "torch":
            self.optimizer = base_class(self.params, **HYPER[base], fused=True)
        elif method in PEERS:
            self.optimizer = PEERS[method].make(torch.nn.ParameterList(self.params), base_class, HYPER[base], {})
        else:
            options = {**HYPER[base], **({"on_nonfinite": "ignore"} if device == "cuda" else {})}
            self.optimizer = getattr(gam_fast, method)(self.params, base_class, backend=backend, **options)
        self.ms: list[float] = []
        self.host_ms: list[float] = []
        self._spans: list[float] = []  # the host's seconds of each part of the last step

    def step(self, *, by_host: bool = False) -> None:
        """Take one step, and append its milliseconds without those of the closure, which provides fresh gradients.

        Autograd makes the gradients, as in training: only the parameters own them, and no Python object refers to them.
        With ``by_host``, append the host's time instead, of a step for which a GPU is not kept busy: launches do not
        wait for a place in a full queue.
        """
        own, spans = clock(self.device), self._spans
        marks, moments = [], []

        def mark() -> None:
            if not by_host:
                marks.append(own.mark())
            moments.append(time.perf_counter())

        def run_ahead() -> None:
            part = len(moments) // 2
            if not by_host:
                keep_busy(self.device, min(LONGEST, 1.5 * spans[part] if part < len(spans) else LONGEST))

        def closure() -> Tensor:
            mark()
            for param in self.params:
                param.grad = None
            torch.autograd.backward(self.params, self.source)  # copies them, because the source is still referenced
            run_ahead()
            mark()
            return torch.zeros(())

        synchronize(self.device)
        run_ahead()
        mark()
        self.optimizer.step(closure)
        mark()
        pairs = range(0, len(moments), 2)
        self._spans = [moments[i + 1] - moments[i] for i in pairs]
        if by_host or self.device == "cpu":
            self.host_ms.append(1e3 * sum(self._spans))
        if not by_host:
            self.ms.append(1e3 * sum(own.seconds(marks[i], marks[i + 1]) for i in pairs))

    @property
    def median(self) -> float:
        """The median step in milliseconds."""
        return statistics.median(self.ms)

    @property
    def spread(self) -> Spread:
        """The median and range of the steps in milliseconds."""
        return Spread.of(self.ms)


def measure(contenders: list[Contender], repeats: int) -> None:
    """Run rounds in which every contender takes one step (see :func:`bench.rounds.rounds`)."""
    for i in rounds(repeats):
        for contender in contenders:
            contender.step()
            if contender.device == "cuda":
                contender.step(by_host=True)
            if i < 0:
                contender.ms.clear()
                contender.host_ms.clear()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return the machine and software versions of a measurement."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "device": name,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "torch": torch.__version__,
        "gam_fast": gam_fast.__version__,
    }


def _processor() -> str:
    """Return the system's name of the CPU model."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
