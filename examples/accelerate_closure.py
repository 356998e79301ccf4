"""Hugging Face Accelerate: the closure form. Start it by ``python``, or by ``accelerate launch`` on several GPUs."""

import sys

import torch
from accelerate import Accelerator
from mnist import mnist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import gam_fast


def main(epochs: int = 3, size: int = 1000, mixed_precision: str = "no") -> list[float]:
    """Return the mean training loss of each epoch."""
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    data = mnist(size)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
    flat = gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, rho=0.1, clip_grad_norm=5.0)
    scheduler = torch.optim.lr_scheduler.StepLR(flat, len(data) // 100, gamma=0.5)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, flat, DataLoader(data, 100, shuffle=True), scheduler
    )
    flat.model = model  # the wrapped model, for BatchNorm and DistributedDataParallel
    means = []
    for _ in range(epochs):
        losses = []
        for x, y in loader:
            seen: list[Tensor] = []

            def closure(x: Tensor = x, y: Tensor = y, seen: list[Tensor] = seen) -> Tensor:
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                seen.append(loss.detach())
                return loss

            optimizer.step(closure)  # Accelerate's wrapper returns nothing
            losses.append(seen[0])  # the loss of the first pass, at the weights
            scheduler.step()
        means.append(float(torch.stack(losses).mean()))
    return means


if __name__ == "__main__":
    print("training loss:", *(f"{loss:.3f}" for loss in main()))
    sys.exit(0)
