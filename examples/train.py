"""Train a small network on handwritten digits by GAM: the usual loop, with one more line."""

from __future__ import annotations

import torch
from mnist import mnist
from torch import nn
from torch.utils.data import DataLoader, random_split

import gam_fast


def main(epochs: int = 3) -> float:
    """Train, and return the test accuracy of the last epoch."""
    torch.manual_seed(0)
    train, test = (DataLoader(part, 64, shuffle=True) for part in random_split(mnist(2000), [1600, 400]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model)
    for epoch in range(epochs):
        for x, y in train:
            for _ in optimizer.passes():
                nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            correct = [(model(x).argmax(1) == y).float() for x, y in test]
        accuracy = float(torch.cat(correct).mean())
        print(f"epoch {epoch}: test accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
