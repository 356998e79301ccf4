"""The reference of the tests of frameworks: a small network, its data, and the plain loop of GAM over both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gam_fast

GAM: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "rho": 0.1, "rho_prime": 0.05}


def loader(batch: int = 12) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(3, (48,), generator=generator)), batch)


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))


def spoil(k: int) -> float:
    """Make the loss of the last pass of the third step of GAM too large."""
    return float("inf") if k == 11 else 1.0


def by_hand(
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    spoil: Callable[[int], float] = lambda k: 1.0,
    **options: Any,
) -> tuple[nn.Module, list[float]]:
    """Two epochs from the seed 9; the model, and the losses at the weights.

    The loss of evaluation k, counted from 0, is multiplied by ``spoil(k)``.
    """
    model = net()
    optimizer = gam_fast.GAM(model.parameters(), torch.optim.SGD, **GAM, model=model, **options)
    losses, evaluations = [], 0
    torch.manual_seed(9)
    for _ in range(2):
        batches = list(loader())  # which draws from the generator, as the loops of frameworks do
        for first in range(0, len(batches), accumulate):
            for turn in optimizer.passes(scaler):
                micro_batches = batches[first : first + accumulate]
                if optimizer.ascent_share < 1:
                    micro_batches = [turn.rows(batch) for batch in micro_batches]
                for x, y in optimizer.micro_batches(micro_batches) if accumulate > 1 else micro_batches:
                    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                        loss = F.cross_entropy(model(x), y) / accumulate * spoil(evaluations)
                    turn.backward(loss)
                    evaluations += 1
                    if turn.index == 0:
                        losses.append(float(loss.detach()))
    return model, losses
