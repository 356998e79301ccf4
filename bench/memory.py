"""Peak memory of training with each method, in sizes of the model: what beside the weights has to fit.

A model of 100 million parameters, two steps of each method in a process of its own. The size is the peak of the process
above what it had with the weights and the batch loaded, before there was an optimizer (on a GPU, of torch's allocator;
otherwise Linux is needed), over the bytes of the parameters: gradients, the state of the base optimizer, the buffers of
the engine and activations. The engine may hold three buffers of the size of the model: where it takes more than
three sizes above the base optimizer alone, this exits with status 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gam_fast

from .contenders import HYPER, machine

BUFFERS = 3
"""That the engine may hold beside the base optimizer's memory: the backup of the weights, u and m."""

SLACK = 0.05
"""Of one size of the model, for what is not a buffer: kernels' tables, pages of the allocator."""


@dataclass(frozen=True)
class Case:
    """A row: a method, and what is done to need less.

    Attributes:
        method: a class of gam_fast, or ``"torch"`` for torch's own base optimizer.
        batch: examples of a step.
        micro_batches: in how many parts they are taken.
        checkpointed: whether activations are computed again in the backward pass.
        dtype: of weights, gradients and buffers.
    """

    method: str
    batch: int
    micro_batches: int = 1
    checkpointed: bool = False
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """What the table calls it."""
        extra = [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        extra += ["checkpointed"] if self.checkpointed else []
        extra += [self.dtype] if self.dtype != "float32" else []
        return ", ".join([self.method, f"batch {self.batch}", *extra])


LIMITED = [Case(method, 16) for method in ("torch", "Base", "SAM", "GSAM", "GAM")]
"""Whose peak is held against the limit: a small batch, so that it is not that of activations."""

ADVICE = [
    Case("torch", 512),
    Case("GAM", 512),
    Case("GAM", 512, micro_batches=8),
    Case("GAM", 512, checkpointed=True),
    Case("GAM", 512, micro_batches=8, dtype="bfloat16"),
]
"""What helps where activations count."""


class Stack(nn.Module):
    """Residual blocks of a linear layer and a nonlinearity, of one width."""

    def __init__(self, width: int, layers: int, *, checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.checkpointed = checkpointed

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x + F.gelu(layer(x))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(self.block, layer, x, use_reentrant=False) if self.checkpointed else self.block(layer, x)
        return x


def allocated(device: str, entry: str) -> int:
    """Bytes in use: now (``VmRSS``), or at most since the process began (``VmHWM``)."""
    if device == "cuda":
        return torch.cuda.memory_allocated() if entry == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(entry)).split()[1])


def in_a_process(measure: Callable[..., float], *arguments: Any) -> float:
    """What ``measure`` finds in a process that has done nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def peak(case: Case, base: str, width: int, layers: int, device: str, threads: int, backend: str) -> float:
    """The peak of two steps of a case, in sizes of the model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    model = Stack(width, layers, checkpointed=case.checkpointed).to(device, dtype)
    x = torch.randn(case.batch, width, device=device, dtype=dtype)
    model(x[:1]).sum().backward()  # what the first use of anything costs
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--base", default="SGD", choices=sorted(HYPER), help="base optimizer (default: SGD, momentum)")
    parser.add_argument("--width", type=int, default=2048, help="of the layers (default: 2048)")
    parser.add_argument("--layers", type=int, default=24, help="default: 24, for 100.7 million parameters")
    parser.add_argument("--backend", default="auto", help="backend of gam_fast (default: auto)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")
    parser.add_argument("--quick", action="store_true", help="without the rows of large batches")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to PATH")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not sys.platform.startswith("linux"):
        parser.error("the peak of a process is read from /proc, which only Linux has; use --device cuda")
    size = (arguments.width, arguments.layers)
    options = (arguments.base, *size, arguments.device, arguments.threads, arguments.backend)
    cases = LIMITED if arguments.quick else LIMITED + ADVICE
    peaks = [in_a_process(peak, case, *options) for case in cases]
    limit = peaks[0] + BUFFERS + SLACK
    facts = machine(arguments.device)
    parameters = arguments.layers * arguments.width * (arguments.width + 1)
    print(f"{parameters / 1e6:.1f} M parameters, {arguments.base}, {facts['device']}, {arguments.threads} threads")
    print(f"{'':<42}{'peak beyond the weights, ÷ size of the model':>44}")
    for case, found in zip(cases, peaks, strict=True):
        print(f"{case.name:<42}{found:>44.2f}")
    over = [case.name for case, found in zip(LIMITED, peaks, strict=False) if found > limit]
    print(f"limit for a method: {limit:.2f}" + (f"; OVER IT: {'; '.join(over)}" if over else ""))
    if arguments.json:
        rows = [{**asdict(case), "peak": found} for case, found in zip(cases, peaks, strict=True)]
        figures = {**facts, "parameters": parameters, "base": arguments.base, "limit": limit, "rows": rows}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
