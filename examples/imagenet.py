"""Train a ResNet-50 or a ViT-S of timm on ImageNet, or on any folder of images, by SGD, AdamW, SAM, GAM or another.

torchrun --nproc-per-node 8 examples/imagenet.py --data ~/imagenet --preset resnet50
torchrun --nproc-per-node 8 examples/imagenet.py --data ~/imagenet --preset vit_small --shard

The folder has ``train`` and ``val`` (or ``validation``), each with one folder per class. ``--batch`` is the total batch
of all processes. ``--shard`` shards weights and state over the processes by FSDP2, instead of copies by DDP. With
``--checkpoint``, a stopped run continues after its last whole epoch, on any number of processes.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

try:
    import timm
    import timm.data
    import training_runs
    from rich.progress import track
    from timm.optim import param_groups_weight_decay
    from training_runs import Curve
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"{error}\nthis example needs more packages: pip install timm rich")


@dataclass(frozen=True, kw_only=True)
class Settings(training_runs.Settings):
    """The settings of a run, apart from its images. ``randaugment`` is timm's policy string, empty for none."""

    network: str = "resnet50"
    base: str = "SGD"
    classes: int = 1000
    size: int = 224
    epochs: int = 90
    warm_up: int = 5
    batch: int = 1024
    lr: float = 0.4
    weight_decay: float = 1e-4
    clip: float = 0.0
    smoothing: float = 0.1
    randaugment: str = ""
    drop_path: float = 0.0
    bf16: bool = True


BASES: Mapping[str, type[torch.optim.Optimizer]] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}

# The radii are starting points: no run of this size has been made yet.
GAM = {"rho": 0.1, "rho_prime": 0.02, "alpha": 0.3, "beta": 0.3, "gamma": 0.03}

PRESETS: Mapping[str, Settings] = {
    "resnet50": Settings(hyper=GAM),
    "vit_small": Settings(
        network="vit_small_patch16_224",
        base="AdamW",
        hyper=GAM,
        epochs=300,
        warm_up=20,
        lr=1e-3,
        weight_decay=0.05,
        clip=1.0,
        randaugment="rand-m9-mstd0.5-inc1",
        drop_path=0.1,
    ),
}


class Run(training_runs.EpochRun):
    """A network in training, on one of several processes or on the only one."""

    settings: Settings

    def __init__(
        self, settings: Settings, data: Path, device: torch.device, *, shard: bool = False, workers: int = 8
    ) -> None:
        super().__init__()
        self.settings, self.device, self.workers = settings, device, workers
        several = distributed.is_initialized()
        self.rank, self.world = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
        if settings.batch % self.world:
            raise SystemExit(f"--batch {settings.batch} must be a multiple of the {self.world} processes")
        self.train_set, self.test_set = (dataset(settings, data, train=train) for train in (True, False))
        self.steps = len(self.train_set) // settings.batch
        if not self.steps:
            raise SystemExit(f"{len(self.train_set)} images are fewer than a batch of {settings.batch}")
        torch.manual_seed(settings.seed)
        model: nn.Module = timm.create_model(settings.network, num_classes=settings.classes, **of_network(settings))
        model.to(device)
        if not shard:  # FSDP2 needs contiguous weights
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's types do not have it
        if settings.compile:
            model.compile()
        self.plain = self.model = model
        if shard:
            for stage in model.children():
                for block in stage.children() if isinstance(stage, nn.Sequential) else ():
                    fully_shard(block)
            fully_shard(model)
        elif several:
            self.model = DistributedDataParallel(model)
        self.optimizer = optimizer(settings, self.model, self.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor)

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate: it warms up, then falls to zero along a cosine."""
        warm_up = self.settings.warm_up * self.steps
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(1, self.settings.epochs * self.steps - warm_up)
        return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))

    def batches(self) -> DataLoader[Any]:
        """Return the batches of this process for an epoch. They depend only on the seed and the epoch."""
        seed = self.settings.seed * 10_000 + self.epoch
        mine = seed * self.world + self.rank
        generator = torch.Generator().manual_seed(mine)
        if not self.workers:  # no generator seeds workers; timm draws from Python and NumPy
            random.seed(mine)
            np.random.seed(mine % 2**32)
        torch.manual_seed(seed)  # seeds dropout
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.train_set, self.world, self.rank, seed=self.settings.seed, drop_last=True
        )
        sampler.set_epoch(self.epoch)
        return DataLoader(
            self.train_set,
            self.settings.batch // self.world,
            sampler=sampler,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            drop_last=True,
            generator=generator,
        )

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross entropy of a batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            scores = self.model(x)
        return F.cross_entropy(scores.float(), y, label_smoothing=self.settings.smoothing)

    def train(self) -> float:
        """Train for one epoch, and return the mean loss."""
        self.model.train()
        losses = []
        quiet = self.rank > 0 or not sys.stderr.isatty()
        for x, y in track(self.batches(), f"epoch {self.epoch + 1}", self.steps, transient=True, disable=quiet):
            x = x.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            y = y.to(self.device, non_blocking=True)
            for turn in self.optimizer.passes():
                loss = self.loss(*turn.rows(x, y))
                turn.backward(loss)
                if turn.index == 0:  # later passes are at perturbed weights
                    losses.append(loss.detach())
            self.schedule.step()
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def test(self) -> tuple[float, float]:
        """Return the loss and the accuracy (in percent) on the test images, over all processes."""
        self.model.eval()
        mine = Subset(self.test_set, range(self.rank, len(self.test_set), self.world))
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # sums of losses and of correct answers
        share = math.ceil(len(self.test_set) / self.world)
        size = min(256, share)
        loader = iter(DataLoader(mine, size, num_workers=self.workers))
        for _ in range(math.ceil(share / size)):  # equal on all processes, because FSDP gathers weights for each
            x, y = next(loader, (torch.zeros(1, 3, self.settings.size, self.settings.size), torch.tensor([-100])))
            x, y = x.to(self.device, memory_format=torch.channels_last), y.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
                scores = self.model(x)
            sums[0] += F.cross_entropy(scores.float(), y, reduction="sum")  # a label of -100 adds nothing
            sums[1] += (scores.argmax(1) == y).sum()
        if self.world > 1:
            distributed.all_reduce(sums)
        loss, correct = (sums / len(self.test_set)).tolist()
        return loss, 100.0 * correct

    def save(self, path: Path) -> None:
        """Gather everything that the next epoch depends on; the first process writes it."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, state = get_state_dict(self.plain, self.optimizer, options=whole)
        if self.rank == 0:
            found = {"epoch": self.epoch, "curve": asdict(self.curve), "schedule": self.schedule.state_dict()}
            training_runs.save(path, self.settings, {"model": model, "optimizer": state, **found})
        if self.world > 1:
            distributed.barrier()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of :meth:`save`."""
        state = training_runs.load(path, self.settings, torch.device("cpu"))
        set_state_dict(
            self.plain,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.curve = state["epoch"], Curve(**state["curve"])


def of_network(settings: Settings) -> dict[str, Any]:
    """Return the arguments that only some networks take."""
    found: dict[str, Any] = {"drop_path_rate": settings.drop_path} if settings.drop_path else {}
    return found | ({"img_size": settings.size} if "vit" in settings.network else {})


def dataset(settings: Settings, data: Path, *, train: bool) -> Any:
    """Return the images of a split: augmented for training, and with a centre crop for tests."""
    try:
        found = timm.data.create_dataset("", root=str(data), split="train" if train else "validation")
    except (FileNotFoundError, RuntimeError, AssertionError) as error:
        raise SystemExit(f"no images at {data}: it must have train/CLASS/*.jpg and val/CLASS/*.jpg ({error})") from None
    found.transform = timm.data.create_transform(
        settings.size,
        is_training=train,
        auto_augment=settings.randaugment or None,
        color_jitter=0.0,
        interpolation="bicubic",
    )
    return found


def optimizer(settings: Settings, model: nn.Module, steps: int) -> Any:
    """Return the method around the base optimizer, without weight decay for biases and normalisations."""
    base = BASES[settings.method if settings.method in BASES else settings.base]
    more: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if base is torch.optim.SGD else {}
    if settings.clip:
        more["clip_grad_norm"] = settings.clip
    groups = param_groups_weight_decay(model, settings.weight_decay)
    return training_runs.wrap(
        settings, model, groups, base, total_steps=steps * settings.epochs, lr=settings.lr, **more
    )


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    """Return the arguments, and the preset's settings with the changes of the command line."""
    more: dict[str, dict[str, Any]] = {
        "--data": {"type": Path, "required": True, "help": "a folder with train/CLASS/*.jpg and val/CLASS/*.jpg"},
        "--shard": {"action": "store_true", "help": "FSDP2 in place of DDP"},
        "--workers": {"type": int, "default": 8, "help": "processes that read images, per training process"},
    }
    helps = {
        "network": "a name that timm.create_model knows",
        "batch": "total batch of all processes",
        "warm_up": "epochs in which the learning rate rises",
        "clip": "the largest norm of a direction; 0 for no limit",
        "randaugment": "timm's name of an augmentation: rand-m9-mstd0.5-inc1",
    }
    return training_runs.parse(argv, PRESETS, BASES, more, {"base": BASES}, helps)


def main(argv: Sequence[str] | None = None) -> Curve:
    """Train from the command line, and return the curve."""
    arguments, settings = parse(argv)
    device = training_runs.device_of(arguments.device)
    mine = not distributed.is_initialized() and "WORLD_SIZE" in os.environ
    if mine:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if arguments.shard and not distributed.is_initialized():
        raise SystemExit("--shard needs several processes: torchrun --nproc-per-node 8 examples/imagenet.py …")
    run = Run(settings, arguments.data, device, shard=arguments.shard, workers=arguments.workers)
    curve: Curve = training_runs.carry_out(run, arguments)
    if mine:
        distributed.destroy_process_group()
    return curve


if __name__ == "__main__":
    main()
