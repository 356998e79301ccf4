"""Lightning: a callback that prepares the optimizers for the run, and refuses settings that fail silently."""

from __future__ import annotations

from typing import Any

from ..optimizer import SharpnessAwareOptimizer

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
except ModuleNotFoundError as error:
    try:  # the same package under its older name
        from pytorch_lightning import LightningModule, Trainer
        from pytorch_lightning.callbacks import Callback
        from pytorch_lightning.utilities.exceptions import MisconfigurationException
    except ModuleNotFoundError:
        raise error from None


class SharpnessAwareCallback(Callback):
    """Prepare a ``Trainer`` whose module is optimized by gam_fast.

    If gam_fast is installed, Lightning adds this callback itself (by the entry point
    ``lightning.pytorch.callbacks_factory``). If gam_fast is only on the path, add it to the callbacks. It leaves other
    optimizers alone.

    At the start of the run it sets ``model=`` of the optimizers to the model as the strategy has wrapped it, for
    BatchNorm and DistributedDataParallel. It refuses three settings under which the optimizer would not see the
    gradients of its passes, and names an alternative:

    - ``gradient_clip_val`` with automatic optimization, which clips the gradient of each pass;
    - ``accumulate_grad_batches`` with automatic optimization, which passes only the last batch to a step;
    - ``precision="16-mixed"`` with automatic optimization, which evaluates the closure once.

    Lightning calls ``training_step`` once per pass. In all passes but the first, the values that it logs and the
    metrics that it updates belong to perturbed weights. Write ``if gam_fast.first_pass(self.optimizers()):`` around
    them; it also works for other optimizers and in validation.

    Raises:
        MisconfigurationException: one of these settings, at the start of the run or when it appears.
        TypeError: DeepSpeed or FSDP1 as strategy; use ``ModelParallelStrategy`` (FSDP2) or ``ddp``.

    >>> import lightning.pytorch as pl
    >>> from gam_fast.integrations import SharpnessAwareCallback
    >>> callback = SharpnessAwareCallback()
    >>> trainer = pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the optimizers' ``model``; check the settings."""
        for optimizer in _flat(trainer):
            optimizer.model = trainer.strategy.model
        self._check(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the settings, which other callbacks may change (``GradientAccumulationScheduler``)."""
        self._check(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what held for the run only."""
        for optimizer in _flat(trainer):
            optimizer._options["skips_empty"] = False

    def _check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = _flat(trainer)
        if not found or not pl_module.automatic_optimization:
            return
        skips = getattr(trainer.fit_loop, "_skip_backward", False)  # in the last epoch of StochasticWeightAveraging
        for optimizer in found:
            optimizer._options["skips_empty"] = skips
        if skips:
            return
        name = type(found[0]).__name__
        several = max(optimizer.recipe.passes for optimizer in found) > 1
        if several and trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"gradient_clip_val={trainer.gradient_clip_val} clips the gradient of each pass of {name}, not its "
                f"step: leave it out, and construct the optimizer with clip_grad_norm={trainer.gradient_clip_val}"
            )
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: automatic optimization gives a step of "
                f"{name} only the last of its batches. Use manual optimization: collect the batches in training_step, "
                "and iterate over optimizer.micro_batches() in each pass"
            )
        if several and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise MisconfigurationException(
                f"precision={trainer.precision!r}: automatic optimization evaluates the closure once, and {name} has "
                f"{found[0].recipe.passes} passes. Use precision='bf16-mixed', or manual optimization: `for turn in "
                "self.optimizers().passes(): self.manual_backward(loss)`"
            )


def external_callbacks() -> list[Callback]:
    """Return the callbacks for the entry point ``lightning.pytorch.callbacks_factory``."""
    return [SharpnessAwareCallback()] if _is_lightning else []


def external_callbacks_of_older_name() -> list[Callback]:
    """Return the callbacks for the entry point ``pytorch_lightning.callbacks_factory``."""
    return [] if _is_lightning else [SharpnessAwareCallback()]


_is_lightning = Callback.__module__.startswith("lightning.")


def _flat(trainer: Any) -> list[SharpnessAwareOptimizer]:
    return [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, SharpnessAwareOptimizer)]
