"""Training runs in which contenders alternate by epochs, so that their times are comparable.

A contender is a method with a share of each batch for its ascent, and an interval of steps. Its cost is counted in
gradients of a whole batch: each pass by the share of the batch that it saw.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import gam_fast
from bench.rounds import rounds
from gam_fast import flatness

from .tasks import Task


@dataclass(frozen=True)
class Contender:
    """A method, the share of the batch that its ascent sees, and how often it ascends."""

    method: str
    share: float = 1.0
    interval: int = 1

    @property
    def name(self) -> str:
        """The name, such as ``GAM .25 /2``: a quarter of the batch, every second step."""
        share = f" {self.share:g}".replace("0.", ".") if self.share < 1 else ""
        return f"{self.method}{share}" + (f" /{self.interval}" if self.interval > 1 else "")

    @property
    def ascents(self) -> float:
        """The number of passes before the last, per step."""
        return (self.kind.recipe.passes - 1) / self.interval

    @property
    def kind(self) -> type[gam_fast.SharpnessAwareOptimizer]:
        """The class of the method."""
        found: type[gam_fast.SharpnessAwareOptimizer] = getattr(
            gam_fast, "Base" if self.method == "base" else self.method
        )
        return found

    def optimizer(self, model: torch.nn.Module, task: Task) -> gam_fast.SharpnessAwareOptimizer:
        """Return the optimizer of a model, around the base optimizer of a task."""
        own: dict[str, Any] = dict(task.settings(self.method, self.share, self.interval))
        if self.share < 1:
            own["ascent_share"] = self.share
        if self.interval > 1:
            own["k" if self.method == "LookSAM" else "interval"] = self.interval
        return self.kind(model.parameters(), task.base, model=model, **task.hyper, **own)


CONTENDERS: Mapping[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("base"),
        Contender("SAM"),
        Contender("SAM", interval=2),
        Contender("SAM", 0.25),
        Contender("GAM"),
        Contender("GAM", 0.5),
        Contender("GAM", 0.25),
        Contender("GAM", 0.15),
        Contender("GAM", interval=4),
        Contender("GAM", 0.5, interval=2),
        Contender("GAM", 0.5, interval=3),
        Contender("GAM", 0.33, interval=2),
        Contender("GAM", 0.25, interval=2),
        Contender("MomentumSAM"),
        Contender("PreviousGradientSAM"),
        Contender("RandomSAM"),
        Contender("LookSAM", interval=5),
        Contender("FriendlySAM"),
        Contender("VaSSO"),
    )
}


def mean_step(seconds: Mapping[int, Sequence[float]]) -> float:
    """Return the mean step time, from medians by number of passes: an interval mixes two kinds of steps."""
    steps = sum(len(own) for own in seconds.values())
    return sum(len(own) * statistics.median(own) for own in seconds.values()) / steps


@dataclass
class Run:
    """The result of a contender for a seed.

    Attributes:
        gradients: gradients of a whole batch per step.
        step_ms: see :func:`mean_step`.
    """

    task: str
    contender: str
    seed: int
    gradients: float = 0.0
    accuracy: float = 0.0
    loss: float = 0.0
    lambda_max: float = 0.0
    r1: float = 0.0
    step_ms: float = 0.0


@dataclass
class Trainer:
    """A contender with its own network, which starts from the weights of the seed and sees the seed's batches."""

    contender: Contender
    task: Task
    seed: int
    seconds: dict[int, list[float]] = field(default_factory=dict)
    shares: float = 0.0

    def __post_init__(self) -> None:
        self.model = self.task.build(self.seed)
        self.batches = torch.Generator().manual_seed(self.seed)
        self.optimizer = self.contender.optimizer(self.model, self.task)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, self.task.epochs)

    def epoch(self) -> None:
        """Train for one epoch."""
        data, model = self.task.data, self.model.train()
        for rows in torch.randperm(len(data.train_y), generator=self.batches).split(self.task.batch):
            x, y = data.train_x[rows], data.train_y[rows]
            start, passes, shares = time.perf_counter(), 0, 0.0
            for turn in self.optimizer.passes():
                own_x, own_y = turn.rows(x, y)
                turn.backward(self.task.loss(model(own_x), own_y))
                passes, shares = passes + 1, shares + turn.share
            self.seconds.setdefault(passes, []).append(time.perf_counter() - start)
            self.shares += shares
        self.schedule.step()

    def run(self) -> Run:
        """Measure the result. With these limits R1 is accurate to about a percent."""
        loss = self.task.training_loss(self.model.eval())
        first = flatness.first_order_flatness(loss, self.task.radius, restarts=1, max_iterations=8)
        eigenvalues = flatness.hessian_eigenvalues(loss, 1)
        return Run(
            task=self.task.name,
            contender=self.contender.name,
            seed=self.seed,
            gradients=self.shares / sum(len(own) for own in self.seconds.values()),
            accuracy=self.task.accuracy(self.model),
            loss=loss.value(),
            lambda_max=eigenvalues.values[0],
            r1=first.value,
            step_ms=1e3 * mean_step(self.seconds),
        )


def train(task: Task, contenders: Sequence[Contender], seed: int, say: Callable[[str], None]) -> list[Run]:
    """Train all contenders with one seed; ``say`` gets progress messages."""
    trainers = [Trainer(contender, task, seed) for contender in contenders]
    for epoch in range(task.epochs):
        say(f"{task.name}, seed {seed}, epoch {epoch + 1}/{task.epochs}")
        for trainer in trainers:
            trainer.epoch()
    say(f"{task.name}, seed {seed}, curvature")
    return [trainer.run() for trainer in trainers]


def gradient_ms(task: Task, shares: Sequence[float], repeats: int = 51) -> dict[float, float]:
    """Time forward and backward alone, in milliseconds, for a batch and shares of it."""
    model = task.build(0).train()
    x, y = task.data.train_x[: task.batch], task.data.train_y[: task.batch]
    found: dict[float, list[float]] = {share: [] for share in shares}
    for i in rounds(repeats):
        for share, own in found.items():
            n = max(1, round(share * len(y)))
            model.zero_grad()
            start = time.perf_counter()
            task.loss(model(x[:n]), y[:n]).backward()
            if i >= 0:
                own.append(1e3 * (time.perf_counter() - start))
    return {share: statistics.median(own) for share, own in found.items()}
