"""Lightning, manual optimization: the loop over ``passes()``, with gradient accumulation over two batches.

Take the passes from ``self.optimizers()``, not from the optimizer itself: ``global_step`` and checkpoints count only
the steps that Lightning's wrapper sees.
"""

import sys

import lightning.pytorch as pl
import torch
from lightning_automatic import fit
from torch import Tensor, nn
from torch.nn import functional as F

import gam_fast


class Classifier(pl.LightningModule):
    """A small classifier, optimized by GAM in its own training step."""

    def __init__(self, accumulate: int = 2) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
        self.accumulate = accumulate
        self.batches: list[list[Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Collect batches, and take a step over all of them."""
        self.batches.append(batch)
        if len(self.batches) < self.accumulate and not self.trainer.is_last_batch:
            return
        optimizer = self.optimizers()
        for turn in optimizer.passes():
            for x, y in optimizer.micro_batches(self.batches):
                loss = F.cross_entropy(self.net(x), y)
                self.manual_backward(loss / len(self.batches))
                if turn.index == 0:
                    self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.batches = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return gam_fast.GAM(self.parameters(), torch.optim.AdamW, lr=1e-3, rho=0.1)


def main(epochs: int = 3, size: int = 1000, precision: str = "32-true") -> pl.Trainer:
    """Train the classifier, and return the trainer."""
    return fit(Classifier(), 50, epochs, size, precision)


if __name__ == "__main__":
    print(f"training loss of the last epoch: {float(main().callback_metrics['train_loss']):.3f}")
    sys.exit(0)
