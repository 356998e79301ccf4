"""Hugging Face Transformers: a tiny GPT-2, randomly initialised, learns to spell Python from Python's own source."""

import argparse
import inspect
import sys
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

import gam_fast
from gam_fast import integrations


def main(steps: int = 60, **options: object) -> integrations.SharpnessAwareTrainer:
    """Train, and return the trainer."""
    text = inspect.getsource(argparse)
    tokens = torch.tensor([ord(letter) for letter in text if ord(letter) < 128])
    rows = tokens[: len(tokens) // 32 * 32].view(-1, 32)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=128, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 2,
            "logging_steps": 20,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
        }
        trainer = integrations.SharpnessAwareTrainer(
            GPT2LMHeadModel(config),
            TrainingArguments(**{**arguments, **options}),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            optimizer_cls_and_kwargs=(
                gam_fast.GAM,
                {"base_optimizer": torch.optim.AdamW, "lr": 3e-3, "rho": 0.1, "rho_prime": 0.05},
            ),
        )
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
    sys.exit(0)
