"""Examples a second of whole training steps: forward, backward and optimizer, for SGD, SAM and GAM.

Synthetic images of the CIFAR shape. The methods take turns within one run; the table gives medians, and their ratio to
torch's fused SGD beside the number of gradients that a step takes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gam_fast

from .contenders import HYPER, machine

METHODS = {"torch": 1, "SAM": 2, "GSAM": 2, "GAM": 4}
"""Methods, and the gradients of their steps."""


class Residual(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """The ResNet-18 for 32 x 32 images, 11.2 million parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width_in = 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Residual(width_in, width, stride), Residual(width, width, 1)]
        width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))


def mlp() -> nn.Module:
    """Three layers, 3.7 million parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 100)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "mlp": mlp}


class Run:
    """One method that trains a model of its own, and the seconds that its steps took."""

    def __init__(self, method: str, arguments: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.method = method
        self.device = torch.device(arguments.device)
        self.autocast: torch.dtype | None = getattr(torch, arguments.autocast) if arguments.autocast else None
        self.model = MODELS[arguments.model]().to(self.device)
        self.x = torch.randn(arguments.batch, 3, 32, 32, device=self.device)
        self.y = torch.randint(100, (arguments.batch,), device=self.device)
        self.optimizer: Any
        if method == "torch":
            self.optimizer = torch.optim.SGD(self.model.parameters(), fused=True, **HYPER["SGD"])
        else:
            options = {"model": self.model, "backend": arguments.backend, **HYPER["SGD"]}
            self.optimizer = getattr(gam_fast, method)(self.model.parameters(), torch.optim.SGD, **options)
        self.seconds: list[float] = []

    def closure(self) -> Tensor:
        if self.method == "torch":
            self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        return loss

    def step(self) -> None:
        start = self._now()
        self.optimizer.step(self.closure)
        self.seconds.append(self._now() - start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--model", default="resnet18", choices=tuple(MODELS), help="default: resnet18")
    parser.add_argument("--batch", type=int, default=128, help="examples of a batch (default: 128)")
    parser.add_argument("--autocast", choices=("bfloat16", "float16"), help="dtype of forward and backward")
    parser.add_argument("--backend", default="auto", help="backend of gam_fast (default: auto)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; medians are taken over them (default: 9)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to PATH")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 7:
        parser.error(f"--repeats must be at least 7 for a median to mean something, got {arguments.repeats}")
    torch.set_num_threads(arguments.threads)
    runs = [Run(method, arguments) for method in METHODS]
    for repeat in range(arguments.repeats + 2):
        for run in runs:
            run.step()
            if repeat < 2:
                run.seconds.clear()
    unit = statistics.median(runs[0].seconds)
    rows = []
    for run in runs:
        seconds = statistics.median(run.seconds)
        row = {"method": run.method, "examples_per_s": arguments.batch / seconds, "ratio": seconds / unit}
        rows.append({**row, "gradients": METHODS[run.method]})
    facts = machine(arguments.device)
    precision = f"autocast {arguments.autocast}" if arguments.autocast else "float32"
    print(f"{arguments.model}, batch {arguments.batch}, {precision}, {facts['device']}, {arguments.threads} threads")
    print(f"{'method':<8}{'examples/s':>12}{'÷ torch':>10}{'gradients':>11}")
    for row in rows:
        print(f"{row['method']:<8}{row['examples_per_s']:>12.0f}{row['ratio']:>10.2f}{row['gradients']:>11}")
    if arguments.json:
        figures = {**facts, "model": arguments.model, "batch": arguments.batch, "autocast": arguments.autocast}
        arguments.json.write_text(json.dumps({**figures, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
