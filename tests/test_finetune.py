"""``examples/finetune.py``: LoRA on a small model with random weights. Nothing but the adapters is perturbed."""

from __future__ import annotations

import finetune
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

TINY = ["--context", "16", "--batch", "8", "--steps", "40", "--test-every", "20", "--warm-up", "4", "--device", "cpu"]


def test_it_learns_and_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, text):
    arguments = ["--data", str(text), *TINY, "--train-head"]
    whole = finetune.main([*arguments, "--output", str(tmp_path / "adapters")])
    assert whole.test_loss[-1] < 0.9 * whole.test_loss[0]
    assert (tmp_path / "adapters" / "adapter_model.safetensors").exists()
    checkpoint = ["--checkpoint", str(tmp_path / "run.pt")]
    parsed, settings = finetune.parse([*arguments, *checkpoint])
    device = torch.device("cpu")
    first = finetune.Run(settings, finetune.Text(parsed.data, device, None), device, None)
    first.train(20)
    first.save(parsed.checkpoint)
    resumed = finetune.main([*arguments, *checkpoint])
    assert resumed.test_loss[-1] == whole.test_loss[-1]


@pytest.mark.parametrize("method", ["SAM", "GAM"])
def test_nothing_but_the_adapters_is_perturbed(text, method):
    parsed, settings = finetune.parse(["--data", str(text), *TINY, "--train-head", "--method", method])
    device = torch.device("cpu")
    run = finetune.Run(settings, finetune.Text(parsed.data, device, None), device, None)
    run.train(2)  # from zeros, the first step moves one of each pair alone
    start = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    x, y = run.text.batch(settings, 0)
    for turn in run.optimizer.passes():
        moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, start[name])}
        assert all("lora_" in name for name in moved)
        assert bool(moved) == (turn.index > 0)
        run.loss(x, y).backward()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in moved)
