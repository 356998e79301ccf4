"""Train a network of the GAM paper on CIFAR-10 or CIFAR-100 by SGD, SAM, GAM or another method of the family.

python examples/cifar.py --data ~/data --preset cifar10-resnet18 --method GAM --late 0.3
torchrun --nproc-per-node 4 examples/cifar.py --data ~/data --preset cifar100-wrn28_10

The presets are the settings of the paper: 200 epochs of SGD, a cosine schedule, label smoothing. ``cpu`` is for a
laptop. The images stay on the device and are augmented there. With ``--checkpoint``, a stopped run continues after its
last whole epoch when it is started again, and ends with the figures of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

try:
    import cifar_images
    import training_runs
    from cifar_networks import NETWORKS
    from rich.progress import track
    from training_runs import Curve
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"{error}\nthis example needs more packages: pip install pillow rich")


@dataclass(frozen=True, kw_only=True)
class Settings(training_runs.Settings):
    """The settings of a run, apart from its images."""

    dataset: str = "cifar10"
    network: str = "resnet18"
    epochs: int = 200
    batch: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    smoothing: float = 0.1
    wrong_labels: float = 0.0
    train_images: int = 0
    validation: int = 0
    ema: float = 0.0

    @property
    def classes(self) -> int:
        """The number of classes."""
        return 100 if self.dataset == "cifar100" else 10


# radii and coefficients of GAM, by data and network
RESNET10 = {"rho": 0.2, "rho_prime": 0.03, "alpha": 0.1, "beta": 0.1, "gamma": 0.05}
RESNET100 = {"rho": 0.2, "rho_prime": 0.02, "alpha": 0.6, "beta": 0.5, "gamma": 0.03}
PYRAMID10 = {"rho": 0.2, "rho_prime": 0.03, "alpha": 0.1, "beta": 0.1, "gamma": 0.03}
PYRAMID100 = {"rho": 0.2, "rho_prime": 0.04, "alpha": 0.5, "beta": 0.3, "gamma": 0.05}

PRESETS: Mapping[str, Settings] = {
    "cpu": Settings(network="small", hyper=RESNET10, epochs=30, train_images=10_000),
    "cifar10-resnet18": Settings(hyper=RESNET10),
    "cifar10-wrn28_10": Settings(network="wrn28_10", hyper=RESNET10),
    "cifar10-pyramidnet110": Settings(network="pyramidnet110", hyper=PYRAMID10),
    "cifar100-resnet18": Settings(dataset="cifar100", hyper=RESNET100),
    "cifar100-wrn28_10": Settings(dataset="cifar100", network="wrn28_10", hyper=RESNET100),
    "cifar100-pyramidnet110": Settings(dataset="cifar100", network="pyramidnet110", hyper=PYRAMID100),
}
"""The settings of the GAM paper (arXiv 2303.03108, supplement). WideResNets use those of ResNet here."""


class Run(training_runs.EpochRun):
    """A network in training, on one of ``world`` processes."""

    settings: Settings

    def __init__(self, settings: Settings, data: Path, device: torch.device, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        if settings.batch % world:
            raise SystemExit(f"--batch {settings.batch} must be a multiple of the {world} processes")
        self.settings, self.device, self.rank, self.world = settings, device, rank, world
        self.train_set, self.test_set = (part.to(device) for part in split(settings, data))
        torch.manual_seed(settings.seed)
        model = NETWORKS[settings.network](settings.classes)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has it, its types do not
        model.to(device)
        self.plain = self.tested = self.model = model
        if settings.ema:
            self.tested = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True)
        if settings.compile:
            self.model.compile()
        if world > 1:
            self.model = DistributedDataParallel(self.model)
        self.steps = len(self.train_set) // settings.batch
        self.optimizer = training_runs.wrap(
            settings,
            self.model,
            self.model.parameters(),
            torch.optim.SGD,
            total_steps=self.steps * settings.epochs,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, settings.epochs)

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the settings."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16)

    def train(self) -> float:
        """Train for one epoch, and return the mean loss."""
        settings, losses = self.settings, []
        self.model.train()
        seed = settings.seed * 10_000 + self.epoch
        batches = cifar_images.batches(self.train_set, settings.batch, seed, self.rank, self.world)
        quiet = self.rank > 0 or not sys.stderr.isatty()
        for x, y in track(batches, f"epoch {self.epoch + 1}", self.steps, transient=True, disable=quiet):
            for turn in self.optimizer.passes():
                some_x, some_y = turn.rows(x, y)
                with self.autocast():
                    loss = F.cross_entropy(self.model(some_x), some_y, label_smoothing=settings.smoothing)
                turn.backward(loss)
                if turn.index == 0:  # later passes are at perturbed weights
                    losses.append(loss.detach())
            if isinstance(self.tested, AveragedModel):
                self.tested.update_parameters(self.plain)
        self.schedule.step()
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """Return the loss and the accuracy (in percent) on the test images."""
        self.tested.eval()
        loss = correct = torch.zeros((), device=self.device)
        for start in range(0, len(self.test_set), 500):
            part = self.test_set[slice(start, start + 500)]
            with self.autocast():
                scores = self.tested(cifar_images.normalised(part.pixels)).float()
            loss = loss + F.cross_entropy(scores, part.labels, reduction="sum")
            correct = correct + (scores.argmax(1) == part.labels).sum()
        return float(loss) / len(self.test_set), 100.0 * float(correct) / len(self.test_set)

    def save(self, path: Path) -> None:
        """Write everything that the next epoch depends on; only the first process writes."""
        if self.rank > 0:
            return
        state = {name: getattr(self, name).state_dict() for name in ("plain", "tested", "optimizer", "schedule")}
        training_runs.save(path, self.settings, {"epoch": self.epoch, "curve": asdict(self.curve), **state})

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of :meth:`save`."""
        state = training_runs.load(path, self.settings, self.device)
        for name in ("plain", "tested", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.epoch, self.curve = state["epoch"], Curve(**state["curve"])


def split(settings: Settings, data: Path) -> tuple[cifar_images.Images, cifar_images.Images]:
    """Return training and test images; with ``validation``, both come from the training set."""
    train = cifar_images.load(data, settings.dataset, "train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(2303))
    if settings.validation:
        test = train[order[-settings.validation :]]
        order = order[: -settings.validation]
    else:
        test = cifar_images.load(data, settings.dataset, "test")
    train = train[order[: settings.train_images or len(order)]]
    if len(train) < settings.batch:
        raise SystemExit(f"{len(train)} images to train on are fewer than a batch of {settings.batch}")
    return cifar_images.with_wrong_labels(train, settings.wrong_labels, settings.classes), test


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    """Return the arguments, and the preset's settings with the changes of the command line."""
    more: dict[str, dict[str, Any]] = {
        "--data": {"type": Path, "required": True, "help": "torchvision's folder, one of image files, or an .npz"},
        "--picture": {"type": Path, "metavar": "FILE", "help": "accuracy against epochs and time, at the end"},
    }
    helps = {
        "wrong_labels": "share of the training labels that are drawn anew",
        "train_images": "number of training images to use; 0 for all",
        "validation": "number of training images to hold out, and test on",
        "ema": "decay of a weight average, which is tested; 0 for none",
    }
    choices = {"network": NETWORKS, "dataset": cifar_images.FOLDERS}
    return training_runs.parse(argv, PRESETS, ["SGD"], more, choices, helps)


def picture(path: Path, settings: Settings, curve: Curve) -> None:
    """Plot the accuracy by epochs and by seconds of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    seconds = [sum(curve.seconds[: i + 1]) for i in range(len(curve.seconds))]
    for axes, (x, label) in zip(
        figure.subplots(1, 2, sharey=True), ((range(1, len(seconds) + 1), "epochs"), (seconds, "seconds")), strict=True
    ):
        axes.plot(x, curve.test_accuracy)
        axes.set(xlabel=label, ylabel="test accuracy in %")
    figure.suptitle(f"{settings.method}, {settings.network}, {settings.dataset}")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> Curve:
    """Train from the command line, and return the curve."""
    arguments, settings = parse(argv)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = training_runs.device_of(arguments.device)
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        run = Run(settings, arguments.data, device, rank, world)
    except cifar_images.DataError as error:
        raise SystemExit(str(error)) from None
    curve: Curve = training_runs.carry_out(run, arguments)
    if rank == 0 and arguments.picture is not None:
        picture(arguments.picture, settings, curve)
    if world > 1:
        distributed.destroy_process_group()
    return curve


if __name__ == "__main__":
    main()
