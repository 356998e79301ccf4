"""mypy and pyright over a user's file: they accept what is documented, and find what is misspelt."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RIGHT = """\
import functools

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import gam_fast
from gam_fast import Turn

model = nn.Linear(2, 1)
x, y = torch.ones(4, 2), torch.ones(4, 1)
optimizer = gam_fast.GAM(
    model.parameters(),
    torch.optim.SGD,
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    nesterov=True,
    rho=0.2,
    rho_prime="auto",
    alpha=0.6,
    beta=(1.0, 0.5),
    gamma=0.03,
    model=model,
    clip_grad_norm=1.0,
    ascent_share=0.25,
    interval=2,
    active=gam_fast.active.Between(0.5, 1.0, total_steps=10),
    on_nonfinite="skip",
    sync="global",
    backend="auto",
    replay_rng=True,
    freeze_running_statistics=True,
)
gam_fast.SAM(model.parameters(), torch.optim.AdamW, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, rho=0.1)
gam_fast.SAM(model.parameters(), torch.optim.RMSprop, alpha=0.9, centered=True)
gam_fast.Base(model.parameters(), torch.optim.Adadelta, rho=0.9, lr=torch.tensor(0.1))
gam_fast.ASAM(model.named_parameters(), functools.partial(torch.optim.SGD, lr=0.1), eta=0.01)
gam_fast.CFlat([{"params": model.weight, "rho": 0.1}, {"params": model.bias}], lr=0.1)
gam_fast.FAD(None, torch.optim.SGD(model.parameters(), lr=0.1), lam=0.5)
gam_fast.GSAM(None, [torch.optim.SGD([model.weight], lr=0.1), torch.optim.AdamW([model.bias])])
gam_fast.GAM(model.parameters(), ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, lr=1e-3, model=model)
gam_fast.ExactGAM(model.parameters(), lr=0.1, sam_rho=0.05)


def closure() -> Tensor:
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def with_turn(turn: Turn) -> Tensor:
    xb, yb = turn.rows(x, y)
    loss = (model(xb) - yb).square().mean()
    turn.backward(loss)
    return loss


def without_loss(turn: Turn, scale: float = 1.0) -> None:
    (model(x) * scale).sum().backward()


for turn in optimizer.passes():
    turn.backward((model(turn.rows(x)) - 1.0).square().mean())
first: Tensor = optimizer.step(closure)
second: Tensor = optimizer.step(with_turn)
optimizer.step(without_loss)
optimizer.step(lambda: closure())
optimizer.step(functools.partial(with_turn))
optimizer.step()
optimizer.step(closure, scaler=torch.amp.GradScaler("cpu"))
optimizer.eval()
plain: torch.optim.Optimizer = optimizer
plain.zero_grad()
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
"""

WRONG = """\
import torch
from torch import Tensor, nn

import gam_fast
from gam_fast import Turn

model = nn.Linear(2, 1)
gam_fast.GAM(model.parameters(), torch.optim.SGD, lr=0.1, rh=0.1)  # error
gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1, adaptive=True)  # error
gam_fast.SAM(model.parameters(), torch.optim.SGD, clip_norm=1.0)  # error
gam_fast.Base(model.parameters(), torch.optim.SGD, momentun=0.9)  # error
gam_fast.GAM(model.parameters(), torch.optim.SGD, ascent_share="half")  # error
gam_fast.GAM(model.parameters(), torch.optim.SGD, rho="large")  # error
gam_fast.GAM(model.parameters(), "sgd")  # error
gam_fast.GAM(model)  # error
optimizer = gam_fast.SAM(model.parameters(), torch.optim.SGD, lr=0.1)


def needs_a_batch(batch: Tensor) -> Tensor:
    return batch


def other_name(t: Turn) -> Tensor:
    return torch.ones(())


optimizer.step(needs_a_batch)  # error
optimizer.step(other_name)  # error
optimizer.step(torch.ones(()))  # error
optimizer.first_step()  # error
optimizer.clip_grad_nrm = 1.0  # error
"""

FILES = {"right.py": RIGHT, "wrong.py": WRONG}

# What a user's file does not need is left out, which takes a minute where nothing is in a cache.
MYPY = """
[mypy]
python_version = 3.10
check_untyped_defs = true
follow_imports = silent
[mypy-gam_fast.integrations.*,gam_fast.flatness.*,gam_fast.backends.triton,gam_fast.kernels.*]
follow_imports = skip
[mypy-torch._dynamo.*,torch._inductor.*,torch._functorch.*,torch._export.*,torch.export.*,torch.fx.*,torch.ao.*]
follow_imports = skip
[mypy-torch.distributed.*,torch.onnx.*,torch.testing.*,torch.utils.data.*,sympy.*,numpy.*]
follow_imports = skip
"""
PYRIGHT = {"typeCheckingMode": "standard", "pythonVersion": "3.10", "extraPaths": [str(ROOT)]}


def by_mypy(folder):
    (folder / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", *FILES]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def by_pyright(folder):
    (folder / "pyrightconfig.json").write_text(json.dumps(PYRIGHT))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, *FILES]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("check", [by_mypy, by_pyright])
def test_what_is_documented_is_accepted_and_what_is_misspelt_is_found(check, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    done = check(tmp_path)
    found = re.findall(r"(right|wrong)\.py:(\d+):(?:\d+)?.*\berror\b", done.stdout)
    expected = [i for i, line in enumerate(WRONG.splitlines(), start=1) if line.endswith("# error")]
    assert done.returncode == 1, done.stdout + done.stderr
    assert sorted({("wrong", i) for i in expected}) == sorted({(name, int(line)) for name, line in found}), done.stdout
