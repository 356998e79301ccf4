"""The cost of second derivatives: a step of ExactGAM against GAM, and two ways to a Hessian-vector product.

Times are medians over rounds in which all take turns, relative to one gradient (forward and backward) of the same model
and batch. Memory is the peak of a separate process above its use before the first step (on a GPU, of torch's allocator;
otherwise Linux is needed), in units of the model's parameters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional as F

import gam_fast

from . import options
from .clock import now
from .contenders import HYPER, machine
from .memory import allocated, in_a_process
from .networks import Block, mlp, resnet18, twice_differentiable
from .report import Table, conditions, write_json

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("Base", {}),
    "GAM": ("GAM", {}),
    "ExactGAM": ("ExactGAM", {}),
    "ExactGAM + SAM": ("ExactGAM", {"sam_rho": 0.05}),
}
PRODUCTS = ("reverse over reverse", "forward over reverse")


def transformer() -> nn.Module:
    """Return a transformer of four blocks of width 256 over 64 positions, 4.8 million parameters."""
    return nn.Sequential(nn.Linear(48, 256), *[Block(256, 4) for _ in range(4)], nn.Flatten(), nn.Linear(64 * 256, 100))


def patches(x: Tensor) -> Tensor:
    """Cut images into 64 patches of 4 x 4 pixels."""
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

    def loss(self, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Return the loss, for other parameters if they are given; all ways use the same attention."""
        with twice_differentiable():
            output = self.model(self.x) if parameters is None else functional_call(self.model, parameters, (self.x,))
        return F.cross_entropy(output, self.y)

    def gradient(self) -> Any:
        """Return the gradient of the loss."""
        return torch.autograd.grad(self.loss(), self.params)

    def product(self, way: str) -> list[Tensor]:
        """Return H v for a fixed v, computed by ``way``."""
        if way == "reverse over reverse":
            grads = torch.autograd.grad(self.loss(), self.params, create_graph=True)
            return list(torch.autograd.grad(grads, self.params, self.vector))
        with forward_ad.dual_level():
            pairs = zip(self.names, self.params, self.vector, strict=True)
            duals = {name: forward_ad.make_dual(p, v) for name, p, v in pairs}
            grads = torch.autograd.grad(self.loss(duals), list(duals.values()))
            return [forward_ad.unpack_dual(grad).tangent for grad in grads]

    def stepper(self, method: str, backend: str) -> Callable[[], object]:
        """Return a function that takes a step of ``method``."""
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
    """Return median seconds of one gradient, of each way to a product and of a step of each method, in turns."""
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


def peak(model: str, method: str, batch: int, device: str, threads: int, backend: str) -> float:
    """Return the peak memory of two steps above that before them, in units of the parameters; run in a new process."""
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
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_common(parser, rounds=7)
    options.add_backend(parser)
    parser.add_argument("--models", default=",".join(MODELS), help="with commas (default: %(default)s)")
    parser.add_argument("--batch", type=options.positive, default=32, help="examples of a batch (default: 32)")
    arguments = options.parse(parser, argv)
    names = options.listed(parser, "--models", arguments.models, MODELS)
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for model in names:
        seconds = times(model, arguments)
        unit = seconds["gradient"]
        setting = (arguments.batch, arguments.device, arguments.threads, arguments.backend)
        peaks = {method: in_a_process(peak, model, method, *setting) for method in METHODS}
        for name, value in seconds.items():
            rows.append({"model": model, "what": name, "ms": 1e3 * value, "gradients": value / unit})
            if name in peaks:
                rows[-1]["memory"] = peaks[name]
    facts = machine(arguments.device)
    columns = {
        "model": "model",
        "what": "what",
        "ms": "ms",
        "gradients": "÷ gradient",
        "memory": "peak ÷ parameters",
    }
    Table(f"batch {arguments.batch}, float32", columns, rows, [conditions(facts)]).show()
    write_json(arguments.json, {**facts, "batch": arguments.batch, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
