"""Hugging Face Transformers: a ``Trainer`` whose steps have several passes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..optimizer import SharpnessAwareOptimizer
from ..passes import Passes

if not hasattr(Trainer, "_clip_grad_norm"):
    raise ImportError(
        f"SharpnessAwareTrainer needs transformers 5.3 or newer, and {transformers.__version__} is installed: "
        "pip install -U transformers"
    )


class _Ended(TrainerCallback):
    """Callback that runs after the Trainer has called ``optimizer.step()``."""

    def __init__(self, trainer: SharpnessAwareTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step; tell the learning-rate schedule if it was skipped."""
        self.trainer._end_step()


class SharpnessAwareTrainer(Trainer):
    """:class:`transformers.Trainer` for the optimizers of gam_fast; with any other optimizer, a plain Trainer.

    Give it the optimizer as the Trainer's ``optimizers=(optimizer, None)``, or as
    ``optimizer_cls_and_kwargs=(gam_fast.GAM, {"base_optimizer": torch.optim.AdamW, "lr": …, "rho": …})``, for which the
    Trainer makes the parameter groups. Under this Trainer:

    - accumulation (``gradient_accumulation_steps``): each pass runs all micro-batches;
    - the training loss is the loss at the weights before any perturbation;
    - ``max_grad_norm`` (default 1.0) limits the final direction, not the gradient of one pass; the optimizer's own
      ``clip_grad_norm`` takes precedence. The logged ``grad_norm`` is the norm of the last pass's gradient;
    - data parallelism and BatchNorm: ``model=`` of the optimizer is the model as the Trainer has wrapped it;
    - fp16: an overflow in any pass undoes the step, and the learning-rate schedule waits; bf16 needs nothing.

    A run that ends by an exception leaves the weights as they were before the current step.

    Raises:
        TypeError: in training, DeepSpeed, FSDP1, ``ExactGAM``, ``ascent_share``, a rule ``WhenSteep``, several GPUs in
            one process or context parallelism, with what to use.
        NonFiniteGradientError: in training, as ``on_nonfinite`` of the optimizer says.

    >>> from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
    >>> import tempfile, torch, gam_fast
    >>> from gam_fast.integrations import SharpnessAwareTrainer
    >>> small = GPT2Config(
    ...     n_layer=1, n_head=2, n_embd=8, vocab_size=7, n_positions=5, bos_token_id=None, eos_token_id=None
    ... )
    >>> model = GPT2LMHeadModel(small)
    >>> tokens = torch.randint(7, (16, 5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trainer = SharpnessAwareTrainer(
    ...         model,
    ...         TrainingArguments(folder, max_steps=2, disable_tqdm=True, report_to=[], use_cpu=True),
    ...         train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    ...         optimizer_cls_and_kwargs=(gam_fast.GAM, {"base_optimizer": torch.optim.AdamW, "lr": 1e-3}),
    ...     )
    ...     trainer.train().global_step
    {...}
    2
    """

    _passes: Passes | None = None  # of the current step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: list[dict[str, Any]] = []  # micro-batches of the current step so far
        self._skipped_before = 0
        self.add_callback(_Ended(self))

    @property
    def flat_optimizer(self) -> SharpnessAwareOptimizer | None:
        """The optimizer of gam_fast inside Accelerate's wrapper; ``None`` for any other optimizer."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, SharpnessAwareOptimizer) else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Run :meth:`transformers.Trainer.train`; undo a step in progress at its end."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._leave()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the first pass on one micro-batch; with the last micro-batch of a step, run the other passes too.

        The Trainer then ends the step by ``optimizer.step()``, as for any other optimizer.

        Returns:
            The loss in the first pass.
        """
        optimizer = self.flat_optimizer
        if optimizer is None:
            return self._backward(model, inputs, num_items_in_batch)
        try:
            if self._passes is None or optimizer.turn is None:
                self._passes = self._begin(optimizer, model)
            self._batches.append(inputs)
            loss = self._backward(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:
                while optimizer.turn is None or not optimizer.turn.last:
                    if next(self._passes, None) is None:  # the step was skipped, so there is nothing to end
                        self.accelerator.gradient_state._set_sync_gradients(False)
                        break
                    for batch in optimizer.micro_batches(self._batches):
                        self._backward(model, batch, num_items_in_batch)
            return loss
        except BaseException:
            self._leave()
            raise

    def _begin(self, optimizer: SharpnessAwareOptimizer, model: nn.Module) -> Passes:
        self._check(optimizer)
        if optimizer.model is not model:
            optimizer.model = model
        if optimizer.clip_grad_norm is None and self.args.max_grad_norm:
            optimizer.clip_grad_norm = self.args.max_grad_norm
        if hasattr(optimizer, "train"):  # a schedule-free base; the Trainer calls train() in each pass
            optimizer.train()
        self._batches, self._skipped_before = [], optimizer.skipped_steps
        passes = optimizer.passes(self.accelerator.scaler)
        next(passes)
        return passes

    def _check(self, optimizer: SharpnessAwareOptimizer) -> None:
        if optimizer.recipe.second_order:
            raise TypeError(
                f"the Trainer calls backward() in each pass, and {optimizer.recipe.name} differentiates the loss by "
                "itself: use GAM, or a loop of your own"
            )
        if optimizer.ascent_share < 1.0:
            raise TypeError(
                f"ascent_share={optimizer.ascent_share}: the Trainer divides each loss by the number of tokens in the "
                "whole batch, but a pass would see only a part of it: leave it out, or use a loop of your own"
            )
        if optimizer.decides_in_first_pass:
            raise TypeError(
                "active=WhenSteep(): the Trainer ends a step in its last pass, but that pass would be known only "
                "after the first: use another rule, or a loop of your own"
            )
        if self.args.n_gpu > 1:
            raise TypeError(
                f"{self.args.n_gpu} GPUs in one process (DataParallel): the random numbers of the other GPUs cannot be "
                "replayed. Start one process per GPU, by torchrun or accelerate launch"
            )
        if getattr(getattr(self.accelerator, "parallelism_config", None), "cp_size", 1) > 1:
            raise TypeError("context parallelism splits the inputs in place, for one pass only: leave it out")

    def _backward(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _end_step(self) -> None:
        if self._passes is not None and self.flat_optimizer is not None:
            # Accelerate's flag for a skipped step
            self.optimizer._is_overflow = self.flat_optimizer.skipped_steps > self._skipped_before
            self._leave()

    def _leave(self) -> None:
        passes, self._passes = self._passes, None
        self._batches = []
        if passes is not None:
            passes.close()  # undoes the step, unless optimizer.step() has ended it

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.flat_optimizer is None:
            return super()._clip_grad_norm(model)
        return self._norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.flat_optimizer is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._norm(model) if grad_norm is None else grad_norm

    def _norm(self, model: nn.Module) -> Tensor:
        """Return the norm of the present gradients, without loss scaling."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        scaler = self.accelerator.scaler
        return norm if scaler is None else norm / scaler.get_scale()
