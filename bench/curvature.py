"""What second derivatives cost: a step of ExactGAM against GAM, and two ways to a Hessian-vector product.

Times are medians over rounds in which all take turns, as ratios to one gradient (forward and backward) of the same
model and batch. Memory is the peak of a process of its own above what it had before the first step (on a GPU, of
torch's allocator; otherwise Linux is needed), in units of the model's parameters.
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
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F

import gam_fast

from .contenders import HYPER, machine
from .memory import allocated, in_a_process
from .throughput import mlp, resnet18

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("Base", {}),
    "GAM": ("GAM", {}),
    "ExactGAM": ("ExactGAM", {}),
    "ExactGAM + SAM": ("ExactGAM", {"sam_rho": 0.05}),
}
PRODUCTS = ("reverse over reverse", "forward over reverse")


class Block(nn.Module):
    """A block of a transformer, its attention written out: fused attention has no second derivative."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        size = width // self.heads
        q, k, v = self.qkv(self.first_norm(x)).view(n, t, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(-1, -2) * size**-0.5).softmax(-1) @ v
        x = x + self.project(mixed.transpose(1, 2).reshape(n, t, width))
        y: Tensor = x + self.mlp(self.second_norm(x))
        return y


def transformer() -> nn.Module:
    """Four blocks of width 256 over 64 positions, 4.8 million parameters."""
    return nn.Sequential(nn.Linear(48, 256), *[Block(256, 4) for _ in range(4)], nn.Flatten(), nn.Linear(64 * 256, 100))


def patches(x: Tensor) -> Tensor:
    """Images as 64 patches of 4 x 4 pixels."""
    return F.unfold(x, 4, stride=4).transpose(1, 2)


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "resnet18": resnet18, "transformer": transformer}


class Task:
    """A model with one batch."""

    def __init__(self, name: str, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.model = MODELS[name]().to(device)
        x = torch.randn(batch, 3, 32, 32, device=device)
        self.x = patches(x) if name == "transformer" else x
        self.y = torch.randint(100, (batch,), device=device)
        self.params = list(self.model.parameters())
        self.names = [name for name, _ in self.model.named_parameters()]
        self.vector = [torch.randn_like(p) for p in self.params]

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def gradient(self) -> Any:
        return torch.autograd.grad(self.loss(), self.params)

    def product(self, way: str) -> list[Tensor]:
        """H v for a given v."""
        if way == "reverse over reverse":
            grads = torch.autograd.grad(self.loss(), self.params, create_graph=True)
            return list(torch.autograd.grad(grads, self.params, self.vector))
        with forward_ad.dual_level():
            pairs = zip(self.names, self.params, self.vector, strict=True)
            duals = {name: forward_ad.make_dual(p, v) for name, p, v in pairs}
            loss = F.cross_entropy(functional_call(self.model, duals, (self.x,)), self.y)
            grads = torch.autograd.grad(loss, list(duals.values()))
            return [forward_ad.unpack_dual(grad).tangent for grad in grads]

    def stepper(self, method: str, backend: str) -> Callable[[], object]:
        name, hyper = METHODS[method]
        options = {"model": self.model, "backend": backend, **HYPER["SGD"], **hyper}
        optimizer = getattr(gam_fast, name)(self.params, torch.optim.SGD, **options)

        def closure() -> Tensor:
            loss = self.loss()
            if name != "ExactGAM":
                loss.backward()
            return loss

        return lambda: optimizer.step(closure)


def times(model: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of one gradient, of each way to a product and of a step of each method: medians, in turns."""
    contenders: dict[str, Callable[[], object]] = {}
    task = Task(model, arguments.batch, arguments.device)
    contenders["gradient"] = task.gradient
    for way in PRODUCTS:
        contenders[way] = lambda way=way: task.product(way)  # type: ignore[misc]
    for method in METHODS:
        contenders[method] = Task(model, arguments.batch, arguments.device).stepper(method, arguments.backend)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats + 1):
        for name, run in contenders.items():
            start = now(arguments.device)
            run()
            seconds[name].append(now(arguments.device) - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak(model: str, method: str, batch: int, device: str, threads: int, backend: str) -> float:
    """Peak memory of two steps above that before them, in units of the parameters; in a process of its own."""
    torch.set_num_threads(threads)
    task = Task(model, batch, device)
    del task.vector
    step = task.stepper(method, backend)
    before = allocated(device, "VmRSS")
    step()
    step()
    size = sum(p.numel() * p.element_size() for p in task.params)
    return (allocated(device, "VmHWM") - before) / size


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--models", default=",".join(MODELS), help="with commas (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="examples of a batch (default: 32)")
    parser.add_argument("--backend", default="auto", help="backend of gam_fast (default: auto)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds; medians are taken over them (default: 7)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to PATH")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 7:
        parser.error(f"--repeats must be at least 7 for a median to mean something, got {arguments.repeats}")
    names = arguments.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models must be of {', '.join(MODELS)}, got {', '.join(unknown)}")
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for model in names:
        seconds = times(model, arguments)
        unit = seconds["gradient"]
        options = (arguments.batch, arguments.device, arguments.threads, arguments.backend)
        peaks = {method: in_a_process(peak, model, method, *options) for method in METHODS}
        for name, value in seconds.items():
            rows.append({"model": model, "what": name, "ms": 1e3 * value, "gradients": value / unit})
            if name in peaks:
                rows[-1]["memory"] = peaks[name]
    facts = machine(arguments.device)
    print(f"batch {arguments.batch}, float32, {facts['device']}, {arguments.threads} threads")
    print(f"{'model':<13}{'what':<22}{'ms':>9}{'÷ gradient':>12}{'peak ÷ parameters':>19}")
    for row in rows:
        held = f"{row['memory']:.1f}" if "memory" in row else ""
        print(f"{row['model']:<13}{row['what']:<22}{row['ms']:>9.1f}{row['gradients']:>12.2f}{held:>19}")
    if arguments.json:
        figures = {**facts, "batch": arguments.batch, "rows": rows}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
