"""The tasks on which methods are compared: data, network, base optimizer and settings.

``digits`` is the task of ``examples/digits.py``, with its wrong labels; ``clean`` is the same without them; ``names``
is that of :mod:`experiments.census`. Settings were chosen on the seeds in ``Task.chosen_on``, and are reported on
others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.data import DataError
from gam_fast import flatness

from . import census

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@dataclass(frozen=True)
class Data:
    """Inputs and classes for training and tests."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    def head(self, n: int) -> Data:
        """Return the first ``n`` inputs and classes."""
        return Data(self.train_x[:n], self.train_y[:n], self.test_x[:n], self.test_y[:n])


@dataclass(frozen=True)
class Task:
    """A classification task and its training.

    Attributes:
        about: a sentence on data and network.
        build: returns the network with the weights of a seed.
        base: class of the base optimizer, and ``hyper`` its arguments; the learning rate falls along a cosine.
        methods: hyper-parameters of each method that runs.
        own: hyper-parameters of a method at a share of the batch and an interval, in place of those in ``methods``.
        radius: ρ of R1.
        measured: number of training examples for λmax and R1, whose measurement takes longer than training.
        chosen_on: seeds on which the settings were chosen.
    """

    name: str
    about: str
    data: Data
    build: Callable[[int], nn.Module]
    base: type[torch.optim.Optimizer]
    hyper: Mapping[str, Any]
    epochs: int
    batch: int
    methods: Mapping[str, Mapping[str, float]]
    own: Mapping[tuple[str, float, int], Mapping[str, float]] = field(default_factory=dict)
    radius: float = 0.1
    measured: int = 1000
    chosen_on: tuple[int, ...] = ()

    @staticmethod
    def loss(output: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return F.cross_entropy(output, y)

    def settings(self, method: str, share: float, interval: int = 1) -> dict[str, float]:
        """Return hyper-parameters of a method whose ascent sees ``share`` of the batch, every ``interval`` steps."""
        return {**self.methods.get(method, {}), **self.own.get((method, share, interval), {})}

    def quick(self, examples: int) -> Task:
        """Return the task with one epoch of four steps, on a few examples."""
        return replace(self, data=self.data.head(examples), epochs=1, batch=examples // 4)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Return the test accuracy in percent, in eval mode."""
        right = model.eval()(self.data.test_x).argmax(1) == self.data.test_y
        return 100.0 * float(right.float().mean())

    def training_loss(self, model: nn.Module) -> flatness.Loss:
        """Return the loss on the first ``measured`` training examples (or all), for measures of a minimum."""
        data = self.data.head(self.measured)
        return flatness.Loss(model, nn.CrossEntropyLoss(), [(data.train_x, data.train_y)])


FARTHER = {"rho": 0.15, "alpha": 0.15}
"""Settings of GAM on the digits with plain steps in between."""


def digits(wrong_labels: bool = True, width: int = 16) -> Task:
    """Return the task of the demo, with its settings, or with another width of its network.

    Raises:
        DataError: a package of the demo is not installed.
    """
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    try:
        import digits as demo
    except ImportError as error:
        raise DataError(f"digits need the packages of the demo ({error}): pip install 'gam-fast[demo]'") from error
    setting = demo.Setting()
    share = setting.wrong_labels if wrong_labels else 0.0
    images = demo.load_digits(share)
    return Task(
        name="digits" if wrong_labels else "clean",
        about=(
            f"{len(images.train_y):,} images of MNIST (14 × 14 pixels) for training, {100 * share:.0f} % with a random "
            f"label, and {len(images.test_y):,} for test; two convolutions with BatchNorm and two linear layers"
        ),
        data=Data(images.train_x, images.train_y, images.test_x, images.test_y),
        build=partial(demo.build_model, width=width),
        base=torch.optim.SGD,
        hyper={"lr": setting.lr, "momentum": setting.momentum},
        epochs=setting.epochs,
        batch=setting.batch_size,
        methods={
            **{method.name: method.hyper for method in demo.METHODS if method.name in ("SAM", "GAM")},
            "MomentumSAM": {"rho": 0.4},
            "PreviousGradientSAM": {"rho": 0.07},
            "RandomSAM": {"rho": 0.2},
            "LookSAM": {"rho": 0.1, "alpha": 0.3},
            "FriendlySAM": {"rho": 0.1},
            "VaSSO": {"rho": 0.05},
        },
        own={
            ("GAM", 0.15, 1): {"alpha": 0.15},
            # at every step SAM fails to train with so large a radius
            ("SAM", 1.0, 2): {"rho": 0.15},
            ("GAM", 1.0, 4): FARTHER,
            ("GAM", 0.5, 3): FARTHER,
            **{("GAM", share, 2): FARTHER for share in (0.5, 0.33, 0.25)},
        },
        radius=setting.radius,
        chosen_on=(10, 11, 12, 13, 14, 15),
    )


def clean() -> Task:
    """Return the task of the demo with correct labels, and with the settings chosen for wrong ones.

    Raises:
        DataError: see :func:`digits`.
    """
    return digits(wrong_labels=False)


TRAIN_NAMES = 2000


def names() -> Task:
    """Return the task to classify a name as a woman's, a man's or a surname, by its letters.

    Raises:
        DataError: the package with the names is not installed.
    """
    x, y = census.names()
    return Task(
        name="names",
        about=(
            f"{TRAIN_NAMES:,} names of the US census for training and {len(y) - TRAIN_NAMES:,} for test, by their "
            "letters first names of women or of men, or surnames; a causal transformer of two blocks"
        ),
        data=Data(x[:TRAIN_NAMES], y[:TRAIN_NAMES], x[TRAIN_NAMES:], y[TRAIN_NAMES:]),
        build=_reader,
        base=torch.optim.AdamW,
        hyper={"lr": 4e-3, "weight_decay": 1.0},
        epochs=24,
        batch=100,
        measured=500,
        methods={
            "SAM": {"rho": 0.01},
            "GAM": {"rho": 0.02, "rho_prime": 0.005, "alpha": 0.3, "beta": 0.3, "gamma": 0.03},
            "MomentumSAM": {"rho": 0.1},
            "PreviousGradientSAM": {"rho": 0.02},
            "RandomSAM": {"rho": 0.2},
        },
        own={("GAM", 0.15, 1): {"alpha": 0.15}},
        radius=0.02,
        chosen_on=(10, 11, 12),
    )


def _reader(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return census.Reader()


TASKS: Mapping[str, Callable[[], Task]] = {"digits": digits, "names": names, "clean": clean}
