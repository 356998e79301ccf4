"""Train a small GPT to write a text letter by letter, by AdamW, SAM, GAM or another method of the family.

python examples/charlm.py --data shakespeare.txt --method GAM --set rho=0.05 --sample 300

The model sees 90 % of the text and is tested on the rest. With ``--checkpoint``, a stopped run continues after its last
test when it is started again, and ends with the figures of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import training_runs
from torch import Tensor, nn
from torch.nn import functional as F

import gam_fast


@dataclass(frozen=True, kw_only=True)
class Settings(training_runs.Settings):
    """The settings of a run, apart from its text."""

    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 128
    dropout: float = 0.1
    steps: int = 2000
    batch: int = 32
    lr: float = 1e-3
    warm_up: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    test_every: int = 250
    train_letters: int = 0


PRESETS: Mapping[str, Settings] = {
    "cpu": Settings(),
    "gpu": Settings(layers=6, heads=6, width=384, context=256, dropout=0.2, steps=5000, batch=64, bf16=True),
}


class Text:
    """A text as letter indices: the first nine tenths for training, the rest for tests.

    Args:
        path: file of the text, in UTF-8.
        device: device of the indices.
        train_letters: number of letters to train on, the last of the nine tenths; 0: all of these.
        validation: test on this many letters before those, and not on the rest, to choose settings.
    """

    def __init__(self, path: Path, device: torch.device, train_letters: int = 0, validation: int = 0) -> None:
        text = path.read_text(encoding="utf-8")
        self.letters = sorted(set(text))
        numbers = {letter: i for i, letter in enumerate(self.letters)}
        tokens = torch.tensor([numbers[letter] for letter in text], device=device)
        self.train, self.test = tokens.tensor_split([len(tokens) * 9 // 10])
        before, self.train = self.train[:-train_letters], self.train[-train_letters:]
        if validation:
            self.test = before[-validation:]

    def batch(self, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
        """Return pieces of the text and their next letters; both depend only on the seed and the step.

        Both are int64 of shape (batch, context).
        """
        generator = torch.Generator().manual_seed(settings.seed * 1_000_000 + step)
        starts = torch.randint(len(self.train) - settings.context, (settings.batch, 1), generator=generator)
        places = (starts + torch.arange(settings.context)).to(self.train.device)
        return self.train[places], self.train[places + 1]


class Block(nn.Module):
    """Attention to earlier letters, and a perceptron, each with normalisation first and a residual connection."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width, self.heads, self.dropout = settings.width, settings.heads, settings.dropout
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Apply attention and perceptron."""
        n, length, width = x.shape
        q, k, v = self.qkv(self.first_norm(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.project(mixed.transpose(1, 2).reshape(n, length, width)), self.dropout, self.training)
        y: Tensor = x + F.dropout(self.mlp(self.second_norm(x)), self.dropout, self.training)
        return y


class GPT(nn.Module):
    """Scores of the next letter, at every position of pieces of shape (n, length)."""

    def __init__(self, settings: Settings, letters: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, settings.width)
        self.places = nn.Embedding(settings.context, settings.width)
        self.blocks = nn.Sequential(*(Block(settings) for _ in range(settings.layers)))
        self.norm, self.head = nn.LayerNorm(settings.width), nn.Linear(settings.width, letters, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the scores of the next letter."""
        x = self.letters(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        scores: Tensor = self.head(self.norm(self.blocks(x)))
        return scores


@dataclass
class Curve:
    """The figures of a run, with one entry per test; losses are in nats per letter."""

    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Run:
    """A model in training."""

    def __init__(self, settings: Settings, text: Text, device: torch.device) -> None:
        self.settings, self.text, self.device = settings, text, device
        torch.manual_seed(settings.seed)
        self.model = self.build().to(device)
        if settings.compile:
            self.model.compile()
        self.optimizer = optimizer(settings, self.model, self.groups())
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.factor)
        self.curve = Curve()
        self.step = 0

    def build(self) -> nn.Module:
        """Return the model."""
        return GPT(self.settings, len(self.text.letters))

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups: only matrices have weight decay."""
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim >= 2]
        rest = [parameter for parameter in self.model.parameters() if parameter.ndim < 2]
        return [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]

    def scores(self, x: Tensor) -> Tensor:
        """Return the model's scores for ``x``."""
        found: Tensor = self.model(x)
        return found

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate: it warms up, then falls to a tenth along a cosine."""
        settings = self.settings
        if step < settings.warm_up:
            return (step + 1) / settings.warm_up
        done = (step - settings.warm_up) / max(1, settings.steps - settings.warm_up)
        return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross entropy of a batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            scores = self.scores(x)
        return F.cross_entropy(scores.float().flatten(0, 1), y.flatten())

    def train(self, steps: int) -> float:
        """Train for ``steps`` steps, and return the mean loss."""
        self.model.train()
        losses = []
        for _ in range(steps):
            x, y = self.text.batch(self.settings, self.step)
            torch.manual_seed(self.settings.seed * 1_000_000 + self.step)  # seeds dropout, so that a run can be resumed
            for turn in self.optimizer.passes():
                loss = self.loss(*turn.rows(x, y))
                turn.backward(loss)
                if turn.index == 0:  # later passes are at perturbed weights
                    losses.append(loss.detach())
            self.schedule.step()
            self.step += 1
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def test(self) -> float:
        """Return the loss on the test part of the text."""
        self.model.eval()
        length = self.settings.context
        pieces = self.text.test[: (len(self.text.test) - 1) // length * length + 1]
        if len(pieces) < 2:
            raise SystemExit(f"the text is too short: its last tenth needs {length + 1} letters, --context and one")
        x, y = pieces[:-1].view(-1, length), pieces[1:].view(-1, length)
        sums = [self.loss(a, b) * len(a) for a, b in zip(x.split(64), y.split(64), strict=True)]
        return float(torch.stack(sums).sum()) / len(x)

    def go_on(self, checkpoint: Path | None = None) -> Curve:
        """Train all remaining steps; test and write a checkpoint at regular intervals."""
        while self.step < self.settings.steps:
            start = time.perf_counter()
            loss = self.train(min(self.settings.test_every, self.settings.steps - self.step))
            seconds = time.perf_counter() - start
            test_loss = self.test()
            for column, value in zip(fields(self.curve), (self.step, loss, test_loss, seconds), strict=True):
                getattr(self.curve, column.name).append(value)
            print(f"step {self.step:5d}  loss {loss:.4f}  test loss {test_loss:.4f}  {seconds:.1f} s")
            if checkpoint is not None:
                self.save(checkpoint)
        return self.curve

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        training_runs.save(path, self.settings, {"step": self.step, "curve": asdict(self.curve), **state})

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of :meth:`save`."""
        state = training_runs.load(path, self.settings, self.device)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.curve = state["step"], Curve(**state["curve"])

    @torch.no_grad()
    def sample(self, letters: int) -> str:
        """Return text of the model, with each letter drawn by its probability."""
        self.model.eval()
        generator = torch.Generator(self.device).manual_seed(self.settings.seed)
        tokens = self.text.test[:1].view(1, 1)
        for _ in range(letters):
            chances = self.scores(tokens[:, -self.settings.context :])[0, -1].float().softmax(0)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator).view(1, 1)], 1)
        return "".join(self.text.letters[i] for i in tokens[0].tolist())


def optimizer(settings: Settings, model: nn.Module, groups: list[dict[str, Any]]) -> gam_fast.SharpnessAwareOptimizer:
    """Return the method around AdamW."""
    return training_runs.wrap(
        settings,
        model,
        groups,
        torch.optim.AdamW,
        total_steps=settings.steps,
        lr=settings.lr,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        clip_grad_norm=settings.clip,
    )


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, Settings]:
    """Return the arguments, and the preset's settings with the changes of the command line."""
    more: dict[str, dict[str, Any]] = {
        "--data": {"type": Path, "required": True, "help": "a text in UTF-8"},
        "--sample": {"type": int, "default": 0, "metavar": "LETTERS", "help": "let the model write, at the end"},
    }
    helps = {
        "warm_up": "steps in which the learning rate rises",
        "clip": "the largest norm of a direction",
        "train_letters": "number of letters to train on; 0: all of the first nine tenths",
    }
    return training_runs.parse(argv, PRESETS, ["AdamW"], more, {}, helps)


def main(argv: Sequence[str] | None = None) -> Curve:
    """Train from the command line, and return the curve."""
    arguments, settings = parse(argv)
    device = torch.device(arguments.device)
    run = Run(settings, Text(arguments.data, device, settings.train_letters), device)
    curve: Curve = training_runs.carry_out(run, arguments)
    if arguments.sample:
        print(run.sample(arguments.sample))
    return curve


if __name__ == "__main__":
    main()
