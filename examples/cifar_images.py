"""Images of examples/cifar.py: read them, and augment them on the device."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SIZE = 32
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp")
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
"""Mean and deviation of the pixels of CIFAR-10, by channel, between 0 and 1."""


class DataError(Exception):
    """There are no images at the path."""


@dataclass(frozen=True)
class Images:
    """Images as uint8 of shape (n, 3, 32, 32), and their classes as int64 of shape (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def to(self, device: torch.device) -> Images:
        """Move the images to a device, where they stay for the whole run: CIFAR's training set takes 150 MB."""
        return Images(self.pixels.to(device), self.labels.to(device))


@lru_cache(maxsize=2)  # an experiment has many runs on the same images
def load(path: Path, dataset: str, split: str) -> Images:
    """Read the images of one split.

    Args:
        path: one of three: a folder in which torchvision has put CIFAR; a folder with a folder for each split, in
            which a folder for each class has image files, resized to 32 x 32; an ``.npz`` file with the arrays
            ``train_jpeg`` (all files one after the other, uint8), ``train_ends`` (the end of each file) and
            ``train_labels``, and the same for ``test``.
        dataset: ``"cifar10"`` or ``"cifar100"``.
        split: ``"train"`` or ``"test"``.

    Raises:
        DataError: none of these exists.
    """
    if path.suffix == ".npz" and path.is_file():
        return _packed(path, split)
    if (path / FOLDERS[dataset]).is_dir():
        return _pickled(path / FOLDERS[dataset], dataset, split)
    if (path / split).is_dir():
        return _folders(path / split)
    raise DataError(
        f"no images at {path}: give a folder with {FOLDERS[dataset]} in it, as torchvision.datasets."
        f"{dataset.upper()}(path, download=True) makes one, a folder with {split}/class/image.png, or an .npz file of "
        "packed JPEGs"
    )


def _pickled(folder: Path, dataset: str, split: str) -> Images:
    """Read the files of the authors of CIFAR. They are pickles: read only files that you trust."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    if dataset == "cifar100":
        names = [split]
    pixels, labels = [], []
    for name in names:
        with (folder / name).open("rb") as file:
            batch = pickle.load(file, encoding="latin1")
        pixels.append(np.asarray(batch["data"]).reshape(-1, 3, SIZE, SIZE))
        labels += batch["labels" if dataset == "cifar10" else "fine_labels"]
    return Images(torch.from_numpy(np.concatenate(pixels)), torch.tensor(labels))


def _packed(path: Path, split: str) -> Images:
    with np.load(path) as arrays:
        files, ends, labels = (arrays[f"{split}_{name}"] for name in ("jpeg", "ends", "labels"))
    parts = np.split(files, ends[:-1])
    return Images(_stacked([_pixels(io.BytesIO(part.tobytes())) for part in parts]), torch.from_numpy(labels).long())


def _folders(folder: Path) -> Images:
    pixels, labels = [], []
    for label, inner in enumerate(sorted(entry for entry in folder.iterdir() if entry.is_dir())):
        for file in sorted(entry for entry in inner.iterdir() if entry.suffix.lower() in SUFFIXES):
            pixels.append(_pixels(file))
            labels.append(label)
    if not pixels:
        raise DataError(f"no image files in the folders of {folder}: one of {', '.join(SUFFIXES)} is expected")
    return Images(_stacked(pixels), torch.tensor(labels))


def _pixels(file: Path | io.BytesIO) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((SIZE, SIZE)))


def _stacked(pixels: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def with_wrong_labels(images: Images, share: float, classes: int, seed: int = 0) -> Images:
    """Return the images with a share of the labels redrawn from all classes, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(images), generator=generator)[: round(share * len(images))]
    labels = images.labels.clone()
    labels[wrong] = torch.randint(classes, (len(wrong),), generator=generator)
    return Images(images.pixels, labels)


def normalised(pixels: Tensor) -> Tensor:
    """Return fp32 pixels with mean 0 and deviation 1 per channel, in channels_last memory format."""
    mean, deviation = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return ((pixels / 255.0 - mean) / deviation).contiguous(memory_format=torch.channels_last)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to 4 pixels in both directions, with zero padding, and mirror half of the images.

    Args:
        x: of shape (n, 3, 32, 32).
        generator: on the device of ``x``.
    """
    n, shift = len(x), 4
    at = torch.randint(2 * shift + 1, (2, n, 1), generator=generator, device=x.device)
    mirrored = torch.rand((n, 1), generator=generator, device=x.device) < 0.5
    steps = torch.arange(SIZE, device=x.device)
    columns = at[1] + torch.where(mirrored, SIZE - 1 - steps, steps)
    rows = at[0] + steps
    images = torch.arange(n, device=x.device).view(n, 1, 1)
    padded = F.pad(x, (shift,) * 4).permute(0, 2, 3, 1)
    return padded[images, rows.view(n, SIZE, 1), columns.view(n, 1, SIZE)].permute(0, 3, 1, 2)


def batches(images: Images, size: int, seed: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the augmented batches of one epoch: the part of process ``rank`` of each batch of ``size``.

    Order and augmentation depend only on the seed, so that a resumed run sees the same data. An incomplete last batch
    is dropped.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    device = images.pixels.device
    generator = torch.Generator(device).manual_seed(seed * world + rank)
    for start in range(0, len(order) - size + 1, size):
        rows = order[start + rank : start + size : world].to(device)
        part = images[rows]
        yield augmented(normalised(part.pixels), generator), part.labels
