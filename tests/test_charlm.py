"""``examples/charlm.py`` on a text that repeats itself: it learns, and a run that was stopped can go on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import charlm
import pytest
import torch

from experiments import evidence

TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "8", "--batch", "8", "--steps", "40"]
TINY += ["--test-every", "20", "--warm-up", "4", "--lr", "0.01"]


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "AdamW"],
        ["--method", "GAM", "--late", "0.5", "--set", "rho=0.05"],
        ["--method", "SAM", "--ascent-share", "0.5", "--interval", "2", "--bf16"],
    ],
    ids=["AdamW", "GAM late", "SAM"],
)
def test_it_learns_and_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, text, options, capsys):
    arguments = ["--data", str(text), "--device", "cpu", *TINY, *options]
    whole = charlm.main([*arguments, "--json", str(tmp_path / "run.json"), "--sample", "5"])
    assert whole.test_loss[-1] < 0.7 * math.log(len(set(text.read_text())))  # that of one who knows nothing
    assert json.loads((tmp_path / "run.json").read_text())["train_loss"] == whole.train_loss
    assert len(capsys.readouterr().out.splitlines()[-1]) == 6  # the letter it began with, and five

    parsed, settings = charlm.parse(arguments)
    first = charlm.Run(settings, charlm.Text(parsed.data, torch.device("cpu")), torch.device("cpu"))
    loss = first.train(20)
    first.curve = charlm.Curve([20], [loss], [first.test()], [1.0])
    first.save(tmp_path / "run.pt")
    resumed = charlm.main([*arguments, "--checkpoint", str(tmp_path / "run.pt")])
    assert resumed.train_loss == whole.train_loss
    assert resumed.test_loss == whole.test_loss


def test_matrices_decay_and_nothing_else(text):
    _, settings = charlm.parse(["--data", str(text), *TINY])
    groups = charlm.Run(settings, charlm.Text(text, torch.device("cpu")), torch.device("cpu")).optimizer.param_groups
    assert [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups] == [(0.1, {2}), (0.0, {1})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--set", "rho"], "NAME=VALUE"), (["--method", "Nothing"], "invalid choice")],
    ids=["no value", "no method"],
)
def test_what_cannot_be_is_said(text, arguments, message, capsys):
    with pytest.raises(SystemExit):
        charlm.main(["--data", str(text), *arguments])
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_short_is_said(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("to be " * 10, encoding="utf-8")
    with pytest.raises(SystemExit, match="too short"):
        charlm.main(["--data", str(path), "--device", "cpu", *TINY])


def test_the_experiment_on_a_text(text, tmp_path, capsys, monkeypatch):
    arms = tuple(arm for arm in evidence.OF_TEXT if arm.name in ("AdamW", "GAM, share .25"))
    monkeypatch.setitem(evidence.TASKS, "quick-text", replace(evidence.TASKS["quick-text"], arms=arms))
    monkeypatch.setattr(evidence, "TUNED", evidence.TUNED[:1])
    results = tmp_path / "results.json"
    command = ["--data", str(text), "--task", "quick-text", "--device", "cpu", "--results", str(results)]
    assert evidence.main([*command, "--tune"]) == 0
    drawn = tmp_path / "gains.png"
    assert evidence.main([*command, "--picture", str(drawn)]) == 0
    assert drawn.read_bytes().startswith(b"\x89PNG")
    runs = json.loads(results.read_text())
    assert [(found["arm"], found["tune"]) for found in runs.values()] == [
        ("AdamW", True),
        ("SAM, rho 0.02", True),
        ("AdamW", False),
        ("GAM, share .25", False),
    ]
    assert all(found["lambda_max"] > 0 and found["steps"] == 2 for found in runs.values() if not found["tune"])
    assert "| GAM, share .25 | 1 | 1.75 |" in capsys.readouterr().out
    assert evidence.main([*command, "--fp32", "--arms", "GAM, share .25"]) == 0
    added = [found for key, found in json.loads(results.read_text()).items() if key not in runs]
    assert [(found["arm"], found["settings"]["bf16"]) for found in added] == [("GAM, share .25, fp32", False)]
    assert all(found["settings"]["bf16"] for found in runs.values())
    shown = capsys.readouterr().out
    assert "| GAM, share .25, fp32 | 1 | 1.75 |" in shown
    assert "| GAM, share .25 | 1 | 1.75 |" in shown


def test_settings_are_chosen_by_letters_that_nothing_is_trained_or_tested_on(text):
    whole, held = (charlm.Text(text, torch.device("cpu"), 100, n) for n in (0, 50))
    assert torch.equal(whole.train, held.train)
    every = charlm.Text(text, torch.device("cpu")).train
    assert torch.equal(held.test, every[-150:-100])
