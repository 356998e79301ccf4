"""timm: make a model and an optimizer by timm's factories, with an optimizer name that ``register_timm`` has added."""

import sys

import timm
import timm.optim
import torch
from mnist import mnist
from torch.nn import functional as F

from gam_fast import integrations


def main(steps: int = 30, size: int = 1000) -> list[float]:
    """Return the training loss of each step."""
    integrations.register_timm()
    torch.manual_seed(0)
    x, y = mnist(size).tensors
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1)
    optimizer = timm.optim.create_optimizer_v2(model, "gamadamw", lr=2e-3, weight_decay=0.05, rho=0.1, rho_prime=0.05)
    losses = []
    for step in range(steps):
        rows = torch.arange(step * 50, step * 50 + 50) % len(x)
        for turn in optimizer.passes():
            loss = F.cross_entropy(model(x[rows]), y[rows])
            turn.backward(loss)
            if turn.index == 0:
                losses.append(float(loss.detach()))
    return losses


if __name__ == "__main__":
    print("training loss:", *(f"{loss:.2f}" for loss in main()[::5]))
    sys.exit(0)
