"""Stop, save, load in a fresh process with ``weights_only=True``, go on: bitwise as if never stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import METHODS, closure_of, make

import gam_fast

RESUME = """
import sys
import torch
from test_checkpoint import build, train
method, base, path, out = sys.argv[1:]
torch.set_num_threads(1)
model, optimizer, scheduler, schedule, batches = build(method, base)
saved = torch.load(path, weights_only=True)
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
scheduler.load_state_dict(saved["scheduler"])
schedule.load_state_dict(saved["schedule"])
torch.set_rng_state(saved["rng"])
train(model, optimizer, scheduler, schedule, batches, range(4, 8))
torch.save(model.state_dict(), out)
"""

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3}),
}


class WithDropout(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.dropout, self.inner = torch.nn.Dropout(0.3), inner

    def forward(self, x):
        return self.inner(self.dropout(x))


def build(method_name, base_name):
    method = METHODS[method_name]
    base, options = BASES[base_name]
    inner, batches = make("batchnorm_cnn", torch.float32)
    model = WithDropout(inner)
    optimizer = method.optimizer(model.parameters(), base, model=model, **options, **method.hyper)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    schedule = gam_fast.schedules.CosineRadius(optimizer, total_steps=8)
    return model, optimizer, scheduler, schedule, batches


def train(model, optimizer, scheduler, schedule, batches, steps):
    for k in steps:
        optimizer.step(closure_of(model, *batches[k % len(batches)]))
        scheduler.step()
        schedule.step()


@pytest.mark.parametrize(("method_name", "base_name"), list(zip(["sam", "asam", "gam_release"], BASES, strict=True)))
def test_resuming_in_a_fresh_process_is_bitwise(tmp_path, method_name, base_name):
    torch.set_num_threads(1)
    model, optimizer, scheduler, schedule, batches = build(method_name, base_name)
    train(model, optimizer, scheduler, schedule, batches, range(4))
    path, out = tmp_path / "checkpoint.pt", tmp_path / "end.pt"
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "schedule": schedule.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(checkpoint, path)
    train(model, optimizer, scheduler, schedule, batches, range(4, 8))
    command = [sys.executable, "-c", RESUME, method_name, base_name, str(path), str(out)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, timeout=300)
    for (name, value), other in zip(
        model.state_dict().items(), torch.load(out, weights_only=True).values(), strict=True
    ):
        assert torch.equal(value, other), name
