"""Lightning, automatic optimization: the trainer calls ``optimizer.step(closure)``; the closure runs once per pass."""

import sys

import lightning.pytorch as pl
import torch
from mnist import mnist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import gam_fast
from gam_fast import integrations


class Classifier(pl.LightningModule):
    """A small classifier, optimized by GAM."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one pass."""
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        if gam_fast.first_pass(self.optimizers()):  # the later passes are at perturbed weights
            self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        """Return the optimizer and its learning-rate schedule."""
        optimizer = gam_fast.GAM(self.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, rho=0.1, clip_grad_norm=5.0)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)}


def fit(module: pl.LightningModule, batch_size: int, epochs: int, size: int, precision: str) -> pl.Trainer:
    """Train ``module``, and return the trainer."""
    trainer = pl.Trainer(
        max_epochs=epochs,
        precision=precision,
        callbacks=[integrations.SharpnessAwareCallback()],  # sets the optimizer's model, and refuses unfit settings
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(mnist(size), batch_size, shuffle=True))
    return trainer


def main(epochs: int = 3, size: int = 1000, precision: str = "32-true") -> pl.Trainer:
    """Train the classifier, and return the trainer."""
    return fit(Classifier(), 100, epochs, size, precision)


if __name__ == "__main__":
    print(f"training loss of the last epoch: {float(main().callback_metrics['train_loss']):.3f}")
    sys.exit(0)
