"""Time of a step without forward and backward, for each method, against torch's own SGD step.

The parameters are those of a ResNet-50 (161 tensors, 25.6 million elements). The closure hands over fresh gradients,
and its own time is taken off: what remains is what the optimizer does between the passes. Methods take turns within one
run; the table gives medians and their ratio to SGD, beside the ratio of bytes that a fully fused step would move.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gam_fast

FLOOR = {"SGD": 5, "Base": 5, "SAM": 10, "GSAM": 13, "GAM": 27}
"""Reads and writes of every element in one fully fused step with momentum: 5 for SGD, then by method."""


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of the 161 parameters of torchvision's resnet50."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, width_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, width_in, 1, 1), (4 * width,), (4 * width,)]
            width_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


class Contender:
    """One optimizer over its own parameters, and the time its steps took."""

    def __init__(self, name: str, shapes: list[tuple[int, ...]], device: str, dtype: torch.dtype, backend: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.name = name
        self.device = device
        self.params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]
        self.source = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
        self.optimizer: Any  # torch's annotation of closures does not allow a tensor
        if name == "SGD":
            self.optimizer = torch.optim.SGD(self.params, **options, fused=device == "cpu" or None)
        else:
            method = getattr(gam_fast, name)
            self.optimizer = method(self.params, torch.optim.SGD, backend=backend, **options)
        self.ms: list[float] = []

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def step(self) -> None:
        """One step; appends its milliseconds without those of the closure."""
        in_closure = 0.0

        def closure() -> Tensor:
            nonlocal in_closure
            self._synchronize()
            start = time.perf_counter()
            grads = [g.clone() for g in self.source]
            self._synchronize()
            for p, g in zip(self.params, grads, strict=True):
                p.grad = g
            in_closure += time.perf_counter() - start
            return torch.zeros(())

        self._synchronize()
        start = time.perf_counter()
        self.optimizer.step(closure)
        self._synchronize()
        self.ms.append(1e3 * (time.perf_counter() - start - in_closure))


def measure(contenders: list[Contender], repeats: int) -> None:
    """A round of warm-up, then rounds in which every contender takes one step."""
    for contender in contenders:
        contender.step()
        contender.ms.clear()
    for _ in range(repeats):
        for contender in contenders:
            contender.step()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float64", "bfloat16"), help="default: float32"
    )
    parser.add_argument("--backend", default="auto", help="backend of gam_fast (default: auto)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; medians are taken over them (default: 9)")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the elements: to see that it works")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to PATH")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 7:
        parser.error(f"--repeats must be at least 7 for a median to mean something, got {arguments.repeats}")
    torch.set_num_threads(arguments.threads)
    shapes = resnet50_shapes()
    if arguments.quick:
        shapes = [(max(1, s[0] // 4), *([max(1, s[1] // 4)] if len(s) > 1 else []), *s[2:]) for s in shapes]
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    build: Callable[[str], Contender] = lambda name: Contender(  # noqa: E731
        name, shapes, arguments.device, dtype, arguments.backend
    )
    contenders = [build(name) for name in FLOOR]
    measure(contenders, arguments.repeats)
    sgd = statistics.median(contenders[0].ms)
    rows = [
        {"method": c.name, "ms": (ms := statistics.median(c.ms)), "ratio": ms / sgd, "floor": FLOOR[c.name] / 5}
        for c in contenders
    ]
    device = (
        torch.cuda.get_device_name() if arguments.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    elements = sum(p.numel() for p in contenders[0].params)
    size = f"{len(shapes)} tensors, {elements / 1e6:.1f} M elements"
    print(f"{size}, {arguments.dtype}, {device}, {arguments.threads} threads")
    print(f"{'method':<8}{'ms':>10}{'÷ SGD':>10}{'floor':>10}")
    for row in rows:
        print(f"{row['method']:<8}{row['ms']:>10.2f}{row['ratio']:>10.2f}{row['floor']:>10.2f}")
    if arguments.json:
        figures = {
            "device": device,
            "dtype": arguments.dtype,
            "elements": elements,
            "threads": arguments.threads,
            "torch": torch.__version__,
            "gam_fast": gam_fast.__version__,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
