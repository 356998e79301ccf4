"""Hugging Face Transformers: a ``Trainer`` whose steps have several passes."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..optimizer import FlatOptimizer
from ..turn import Turn


class FlatTrainer(Trainer):
    """:class:`transformers.Trainer` for the optimizers of gam_fast; with any other optimizer it is the Trainer itself.

    Give it the optimizer as the Trainer's ``optimizers=(optimizer, None)``, or as
    ``optimizer_cls_and_kwargs=(gam_fast.GAM, {"base_optimizer": torch.optim.AdamW, "lr": …, "rho": …})``, for which the
    Trainer makes the parameter groups. What a step means is then

    - accumulation (``gradient_accumulation_steps``): all micro-batches are in each pass;
    - the training loss: that at the weights, before any perturbation;
    - ``max_grad_norm`` (1.0, unless you say otherwise): the limit of the final direction, not of the gradient of one
      pass. The ``grad_norm`` that is logged is the norm of the last pass's gradient;
    - data parallelism and BatchNorm: ``model=`` of the optimizer is the model as the Trainer has wrapped it;
    - fp16: an overflow in any pass undoes the step; bf16 needs nothing.

    A run that ends by an exception leaves the weights as they were before the step.

    Raises:
        TypeError: in training, DeepSpeed or FSDP1, with what to use.
        NonFiniteGradientError: in training, as ``on_nonfinite`` of the optimizer says.

    >>> from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments
    >>> import tempfile, torch, gam_fast
    >>> from gam_fast.integrations import FlatTrainer
    >>> small = GPT2Config(
    ...     n_layer=1, n_head=2, n_embd=8, vocab_size=7, n_positions=5, bos_token_id=None, eos_token_id=None
    ... )
    >>> model = GPT2LMHeadModel(small)
    >>> tokens = torch.randint(7, (16, 5))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trainer = FlatTrainer(
    ...         model,
    ...         TrainingArguments(folder, max_steps=2, disable_tqdm=True, report_to=[], use_cpu=True),
    ...         train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    ...         optimizer_cls_and_kwargs=(gam_fast.GAM, {"base_optimizer": torch.optim.AdamW, "lr": 1e-3}),
    ...     )
    ...     trainer.train().global_step
    {...}
    2
    """

    _turns: Generator[Turn, None, None] | None = None
    _micro_batches: list[dict[str, Any]]

    @property
    def flat_optimizer(self) -> FlatOptimizer | None:
        """The optimizer of gam_fast, out of the wrapper of Accelerate; ``None`` if it is another."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, FlatOptimizer) else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """:meth:`transformers.Trainer.train`; a step that is under way when it ends is undone."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._turns is not None:
                self._turns.close()
                self._turns = None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one micro-batch in the first pass, and with the last of a step the other passes.

        The Trainer then ends the step by ``optimizer.step()``, as that of any other optimizer; to drop the passes
        before that is to undo it.

        Returns the loss in the first pass.
        """
        optimizer = self.flat_optimizer
        if optimizer is None:
            return self._backward(model, inputs, num_items_in_batch)
        if self._turns is None or optimizer.turn is None:
            if optimizer.model is not model:
                optimizer.model = model
            if self.args.max_grad_norm:
                optimizer.clip_grad_norm = self.args.max_grad_norm
            self._micro_batches = []
            self._turns = optimizer.passes()
            next(self._turns)
        self._micro_batches.append(inputs)
        loss = self._backward(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            for _ in range(1, optimizer.recipe.passes):
                next(self._turns)
                for batch in optimizer.micro_batches(self._micro_batches):
                    self._backward(model, batch, num_items_in_batch)
        return loss

    def _backward(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.flat_optimizer is None:
            return super()._clip_grad_norm(model)
        return self._norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self.flat_optimizer is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._norm(model) if grad_norm is None else grad_norm

    def _norm(self, model: nn.Module) -> Tensor:
        """The norm of the gradient that is there, not scaled."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        scaler = self.accelerator.scaler
        return norm if scaler is None else norm / scaler.get_scale()
