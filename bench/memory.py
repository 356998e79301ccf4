"""Peak memory of training with each method, in sizes of the model, besides the weights.

Each method takes two steps in its own process: on 100 million parameters, and on a deep model. The size is the peak of
the process above its use with weights and batch loaded and no optimizer, divided by the bytes of the parameters (on a
GPU, of torch's allocator; otherwise Linux is needed). It includes gradients, the state of the base optimizer, the
engine's buffers and activations. The engine may hold three buffers of the size of the model: if a method takes more
than three sizes above torch's own optimizer, the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gam_fast

from . import options
from .contenders import HYPER, machine
from .report import write_json

BUFFERS = 3
"""Buffers that the engine may hold besides the base optimizer's memory: the backup of the weights, u and m."""

SLACK = 8 << 20
"""Bytes allowed for everything else: tables, pages of the allocator."""


@dataclass(frozen=True)
class Case:
    """A row: a method, a model, and measures to save memory.

    Attributes:
        method: a class of gam_fast, or ``"torch"`` for torch's own base optimizer.
        batch: examples per step.
        micro_batches: number of micro-batches per step.
        checkpointed: whether activations are recomputed in the backward pass.
        dtype: dtype of weights, gradients and buffers.
        width, layers: dimensions of the model.
    """

    method: str
    batch: int
    micro_batches: int = 1
    checkpointed: bool = False
    dtype: str = "float32"
    width: int = 2048
    layers: int = 24

    @property
    def name(self) -> str:
        """The name in the table."""
        extra = [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        extra += ["checkpointed"] if self.checkpointed else []
        extra += [self.dtype] if self.dtype != "float32" else []
        return ", ".join([self.method, *extra])

    @property
    def setting(self) -> str:
        """The setting that groups rows."""
        return f"{self.parameters / 1e6:.1f} M parameters in {self.layers} layers, batch {self.batch}"

    @property
    def parameters(self) -> int:
        """The number of elements of the model."""
        return self.layers * self.width * (self.width + 1)

    @property
    def limit(self) -> float:
        """The memory allowed above torch's own optimizer, in sizes of the model."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return BUFFERS + SLACK / (self.parameters * dtype.itemsize)

    @property
    def by_torch(self) -> Case:
        """The same case without gam_fast."""
        return replace(self, method="torch")


LARGE = [Case(method, 16) for method in ("torch", "Base", "SAM", "GSAM", "GAM")]
"""100 million parameters and a small batch: gradients, state and buffers dominate the peak."""

DEEP = [
    Case(method, 1024, micro_batches, checkpointed, dtype, width=512, layers=96)
    for method, micro_batches, checkpointed, dtype in (
        ("torch", 1, False, "float32"),
        ("SAM", 1, False, "float32"),
        ("GAM", 1, False, "float32"),
        ("torch", 8, False, "float32"),
        ("GAM", 8, False, "float32"),
        ("torch", 1, True, "float32"),
        ("GAM", 1, True, "float32"),
        ("torch", 8, False, "bfloat16"),
        ("GAM", 8, False, "bfloat16"),
    )
]
"""A narrow and deep model with a large batch, where activations dominate, and the measures that help."""

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": "0"}
"""Settings of glibc: freed memory returns to the system at once, so that the peak counts memory in use."""


CONTROL_GROUP = Path("/sys/fs/cgroup")
"""The folder in which Linux shows a container's memory limit."""


class Stack(nn.Module):
    """Residual blocks of a linear layer and a nonlinearity, of one width."""

    def __init__(self, width: int, layers: int, *, checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.checkpointed = checkpointed

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Apply one residual block."""
        return torch.add(x, F.gelu(layer(x)), alpha=1.0 / len(self.layers))

    def forward(self, x: Tensor) -> Tensor:
        """Apply all blocks."""
        for layer in self.layers:
            x = checkpoint(self.block, layer, x, use_reentrant=False) if self.checkpointed else self.block(layer, x)
        return x


def allocated(device: str, entry: str) -> int:
    """Return the bytes in use now (``VmRSS``), or at most since the process began (``VmHWM``)."""
    if device == "cuda":
        return torch.cuda.memory_allocated() if entry == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])


@contextmanager
def exact_allocator() -> Iterator[None]:
    """Set :data:`ALLOCATOR` for processes that start within the block."""
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    os.environ.update(ALLOCATOR)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def available(device: str) -> int:
    """Return the bytes available without swapping, also within the control group; on a GPU, the free bytes."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    limit = CONTROL_GROUP / "memory.max"
    if limit.exists() and (most := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, int(most) - int((CONTROL_GROUP / "memory.current").read_text(encoding="ascii")))
    return free


def in_a_process(measure: Callable[..., float], *arguments: Any) -> float:
    """Return the result of ``measure`` in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def peak(case: Case, base: str, device: str, threads: int, backend: str) -> float:
    """Return the peak of two steps of a case, in sizes of the model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    model = Stack(case.width, case.layers, checkpointed=case.checkpointed).to(device, dtype)
    x = torch.randn(case.batch, case.width, device=device, dtype=dtype)
    model(x[:1]).sum().backward()  # pays for first uses
    model.zero_grad()
    before = allocated(device, "VmRSS")
    optimizer: Any
    if case.method == "torch":
        optimizer = getattr(torch.optim, base)(model.parameters(), **HYPER[base])
    else:
        base_class = getattr(torch.optim, base)
        optimizer = getattr(gam_fast, case.method)(model.parameters(), base_class, backend=backend, **HYPER[base])

    def closure() -> None:
        for part in x.chunk(case.micro_batches):
            (model(part).square().mean() / case.micro_batches).backward()

    for _ in range(2):
        if case.method == "torch":
            closure()
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.step(closure)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return (allocated(device, "VmHWM") - before) / size


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_common(parser, rounds=None)
    options.add_backend(parser)
    parser.add_argument("--base", default="SGD", choices=sorted(HYPER), help="base optimizer (default: SGD, momentum)")
    parser.add_argument("--quick", action="store_true", help="without the deep model")
    arguments = options.parse(parser, argv)
    if arguments.device == "cpu" and not sys.platform.startswith("linux"):
        parser.error("the peak of a process is read from /proc, which only Linux has; use --device cuda")
    setting = (arguments.base, arguments.device, arguments.threads, arguments.backend)
    with exact_allocator():
        peaks = {case: in_a_process(peak, case, *setting) for case in (LARGE if arguments.quick else LARGE + DEEP)}
    facts = machine(arguments.device)
    print(f"peak beyond the weights, in sizes of the model: {arguments.base}, {facts['device']}")
    for what, cases in itertools.groupby(peaks, key=lambda case: case.setting):
        print(what)
        for case in cases:
            print(f"  {case.name:<32}{peaks[case]:>6.2f}")
    over = [case for case, found in peaks.items() if found > peaks[case.by_torch] + case.limit]
    for case in over:
        print(f"{case.name}: more than {BUFFERS} sizes above torch's own optimizer")
    rows = [{**asdict(case), "peak": found} for case, found in peaks.items()]
    write_json(arguments.json, {**facts, "base": arguments.base, "rows": rows})
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
