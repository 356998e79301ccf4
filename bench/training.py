"""Whole training steps that take turns within one run: forward and backward, and the optimizer's part.

The time of forward and backward is measured inside the closure; the rest of a step is the optimizer's. ``ExactGAM``
differentiates the loss outside of its closure. So for it the loss, its gradient and a Hessian-vector product are timed
separately, once per round, and count once per pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gam_fast

from .clock import clock, now, synchronize
from .contenders import FLOOR, HYPER
from .data import Batch
from .memory import allocated, exact_allocator, in_a_process
from .networks import NETWORKS, twice_differentiable
from .peers import PEERS, Stepper
from .rounds import rounds

TORCH = ("SGD", "AdamW")
"""Methods that are torch's own fused optimizers, with one gradient per step."""

METHODS = (*TORCH, "SAM", "GSAM", "GAM", "ExactGAM")


@dataclass(frozen=True)
class Setting:
    """Options that all entrants share.

    Attributes:
        base: base optimizer of gam_fast's methods and of peers.
        dtype: dtype of parameters and inputs.
        autocast: dtype of forward and backward, if it differs.
        compiled: whether the model goes through ``torch.compile``.
    """

    device: str = "cpu"
    base: str = "SGD"
    dtype: str = "float32"
    autocast: str | None = None
    batch: int = 32
    threads: int = 2
    backend: str = "auto"
    compiled: bool = False
    channels_last: bool = False

    def place(self, batch: Batch) -> Batch:
        """Move a batch to the device, with images in the dtype and layout of the parameters."""
        x, y = (part.to(self.device, non_blocking=True) for part in batch)
        if x.is_floating_point():
            dtype: torch.dtype = getattr(torch, self.dtype)
            x = x.to(dtype, memory_format=torch.channels_last if self.channels_last else torch.preserve_format)
        return x, y


@dataclass(frozen=True)
class Entrant:
    """A participant: a method, or a key of :data:`bench.peers.PEERS`."""

    key: str

    @property
    def name(self) -> str:
        """The name in tables."""
        return PEERS[self.key].name if self.key in PEERS else self.key

    @property
    def method(self) -> str:
        """The corresponding method."""
        return PEERS[self.key].method if self.key in PEERS else self.key

    @property
    def second_order(self) -> bool:
        """True if it differentiates the loss itself."""
        return self.key not in (*TORCH, *PEERS) and bool(getattr(gam_fast, self.key).recipe.second_order)

    def units(self, base: str) -> int | None:
        """Return the reads and writes per element of a fully fused step, or None if unknown."""
        return FLOOR[self.key]["torch"] if self.key in TORCH else FLOOR[base].get(self.method)

    def optimizer(self, model: torch.nn.Module, setting: Setting) -> Stepper:
        """Return an optimizer for a model."""
        found: Any  # torch's annotation does not allow closures that return a tensor
        if self.key in TORCH:
            found = getattr(torch.optim, self.key)(model.parameters(), fused=True, **HYPER[self.key])
        elif self.key in PEERS:
            found = PEERS[self.key].make(model, getattr(torch.optim, setting.base), HYPER[setting.base], {})
        else:
            options = {"model": model, "backend": setting.backend, **HYPER[setting.base]}
            found = getattr(gam_fast, self.key)(model.parameters(), getattr(torch.optim, setting.base), **options)
        stepper: Stepper = found
        return stepper


@dataclass(frozen=True)
class Step:
    """One step: its seconds, those of forward and backward, its passes, and the number of its inputs."""

    seconds: float
    gradients: float
    passes: int
    inputs: int

    @property
    def optimizer(self) -> float:
        """The seconds without forward and backward."""
        return self.seconds - self.gradients


class Trainer:
    """An entrant that trains its own network from the same weights as all others; ``steps`` records its steps."""

    def __init__(self, entrant: Entrant, network: str, setting: Setting) -> None:
        torch.manual_seed(0)
        self.entrant, self.setting = entrant, setting
        self.loss = NETWORKS[network].loss
        model = NETWORKS[network].build().to(setting.device, getattr(torch, setting.dtype))
        if setting.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own form
        self.params = list(model.parameters())
        self.model: Any = model  # a compiled model has the type of a function
        if setting.compiled:
            self.model = torch.compile(model)
        self.optimizer = entrant.optimizer(self.model, setting)
        self.clock = clock(setting.device)
        self.steps: list[Step] = []

    @property
    def elements(self) -> int:
        """The number of elements of all parameters."""
        return sum(param.numel() for param in self.params)

    @property
    def bytes(self) -> int:
        """The bytes of all parameters."""
        return sum(param.numel() * param.element_size() for param in self.params)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss."""
        dtype = getattr(torch, self.setting.autocast) if self.setting.autocast else None
        attention = twice_differentiable() if self.entrant.second_order else nullcontext()
        with attention, torch.autocast(self.setting.device, dtype, enabled=dtype is not None):
            return self.loss(self.model(x), y)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Take one step; first time a separate second derivative if the step's own cannot be timed."""
        beside = self._second_derivative(x, y) if self.entrant.second_order else None
        synchronize(self.setting.device)
        start = self.clock.mark()
        marks = self.take(x, y)
        seconds = self.clock.seconds(start, self.clock.mark())
        gradients = sum(self.clock.seconds(*pair) for pair in marks) if beside is None else len(marks) * beside
        self.steps.append(Step(seconds, gradients, len(marks), len(x)))

    def take(self, x: Tensor, y: Tensor) -> list[tuple[Any, Any]]:
        """Take one step; return the marks around each evaluation of its closure."""
        marks = []

        def closure() -> Tensor:
            if self.entrant.key in TORCH:
                for param in self.params:
                    param.grad = None
            start = self.clock.mark()
            loss = self.forward(x, y)
            if not self.entrant.second_order:
                loss.backward()
            marks.append((start, self.clock.mark()))
            return loss

        self.optimizer.step(closure)
        return marks

    def _second_derivative(self, x: Tensor, y: Tensor) -> float:
        """Return the seconds for the loss, its gradient, and the Hessian times the gradient."""
        start = self.clock.mark()
        grads = torch.autograd.grad(self.forward(x, y), self.params, create_graph=True)
        torch.autograd.grad(grads, self.params, [grad.detach() for grad in grads])
        return self.clock.seconds(start, self.clock.mark())


class Copy:
    """The speed of memory: torch's copy of as many bytes as a network has; ``seconds`` records its times."""

    def __init__(self, like: Trainer) -> None:
        self.device, self.bytes = like.setting.device, like.bytes
        self.source = torch.ones(like.elements, dtype=like.params[0].dtype, device=self.device)
        self.target = torch.empty_like(self.source)
        self.clock = clock(self.device)
        self.seconds: list[float] = []

    def run(self) -> None:
        """Time one copy, after an untimed one that warms the caches."""
        self.target.copy_(self.source)
        start = self.clock.mark()
        self.target.copy_(self.source)
        self.seconds.append(self.clock.seconds(start, self.clock.mark()))


def train_in_turns(trainers: Sequence[Trainer], copy: Copy, batches: Iterator[Batch], repeats: int) -> list[float]:
    """Run rounds in which every trainer takes one step on the same batch; each round starts with another trainer.

    Return the seconds to load each batch and move it to the device, which are no part of any step.
    """
    setting = trainers[0].setting
    loading = []
    for i in rounds(repeats):
        start = now(setting.device)
        x, y = setting.place(next(batches))
        loading.append(now(setting.device) - start)
        first = i % len(trainers)
        for trainer in (*trainers[first:], *trainers[:first]):
            trainer.step(x, y)
        copy.run()
        if i < 0:
            loading.clear()
            copy.seconds.clear()
            for trainer in trainers:
                trainer.steps.clear()
    return loading


def peak(trainer: Trainer, x: Tensor, y: Tensor) -> int:
    """Return the peak bytes of two steps above those in use before, with weights and batch but no gradients."""
    device = trainer.setting.device
    grads = torch.autograd.grad(trainer.forward(x[:1], y[:1]), trainer.params)  # pays for first uses
    del grads
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = allocated(device, "VmRSS")
    for _ in range(2):
        trainer.take(x, y)
    return allocated(device, "VmHWM") - before


def peak_in_a_process(entrant: Entrant, network: str, setting: Setting) -> int:
    """Return :func:`peak` on a CPU, measured for a whole process."""
    with exact_allocator():
        return int(in_a_process(_peak, entrant, network, setting))


def _peak(entrant: Entrant, network: str, setting: Setting) -> int:
    torch.set_num_threads(setting.threads)
    trainer = Trainer(entrant, network, setting)
    return peak(trainer, *setting.place(NETWORKS[network].batch(setting.batch)))
