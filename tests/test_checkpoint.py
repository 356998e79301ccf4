"""Stop, save, load in a fresh process with ``weights_only=True``, go on: bitwise as if never stopped."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from cases import ALL, RANDOM, WithDropout, closure_of, make

import gam_fast

RESUME = """
import sys
import torch
from test_checkpoint import BASES, build, train
torch.set_num_threads(1)
for name in BASES:
    model, optimizer, scheduler, schedule, batches = build(name)
    saved = torch.load(f"{sys.argv[1]}/{name}.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    schedule.load_state_dict(saved["schedule"])
    torch.set_rng_state(saved["rng"])
    train(model, optimizer, scheduler, schedule, batches, range(4, 8))
    torch.save(model.state_dict(), f"{sys.argv[1]}/{name} resumed.pt")
"""

BASES = {
    "sam": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "asam": (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True}),
    "gam_release": (torch.optim.RMSprop, {"lr": 1e-3}),
    "friendly": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "vasso": (torch.optim.RMSprop, {"lr": 1e-3}),
    "momentum_sam": (torch.optim.AdamW, {"lr": 1e-2}),
    "previous_gradient": (torch.optim.AdamW, {"lr": 1e-2}),
    "look": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "random": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


def build(name):
    method, (base, options) = (ALL | {"random": RANDOM})[name], BASES[name]
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


def test_resuming_in_a_fresh_process_is_bitwise(tmp_path):
    torch.set_num_threads(1)
    expected = {}
    for name in BASES:
        model, optimizer, scheduler, schedule, batches = build(name)
        train(model, optimizer, scheduler, schedule, batches, range(4))
        checkpoint = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(checkpoint, tmp_path / f"{name}.pt")
        train(model, optimizer, scheduler, schedule, batches, range(4, 8))
        expected[name] = model.state_dict()
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path)], check=True, cwd=Path(__file__).parent, timeout=300)
    for name, state in expected.items():
        found = torch.load(tmp_path / f"{name} resumed.pt", weights_only=True)
        for key, value in state.items():
            assert torch.equal(value, found[key]), f"{name}: {key}"
