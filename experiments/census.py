"""Names of the United States census of 1990, and a small transformer that classifies a name by its letters.

The lists are data files of the PyPI package ``names``; nothing is downloaded. The three classes are first names of
women, first names of men, and the most frequent surnames. No name is in two classes: first names of both women and men
are left out, and so are surnames that are also first names.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.data import DataError
from bench.networks import Block, twice_differentiable

CLASSES = ("female", "male", "surname")
SURNAMES = 4000
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
END = 1 + len(LETTERS)
"""The token after the last letter. Letters are from 1 on, and 0 is padding."""

LENGTH = 14
"""Tokens per name: the longest has 13 letters."""


def lists() -> tuple[list[str], ...]:
    """Return the names of each class, most frequent first, without those in two classes.

    Raises:
        DataError: the package is not installed, or has different files.
    """
    found = importlib.util.find_spec("names")
    if found is None or found.origin is None:
        raise DataError("the names of the census are in the package names: pip install names")
    female, male, surnames = (
        _read(Path(found.origin).with_name(f"dist.{part}")) for part in ("female.first", "male.first", "all.last")
    )
    first = {*female, *male}
    both = {*female} & {*male}
    return (
        [name for name in female if name not in both],
        [name for name in male if name not in both],
        [name for name in surnames if name not in first][:SURNAMES],
    )


def _read(path: Path) -> list[str]:
    """Return the first word of each line."""
    try:
        return [line.split()[0] for line in path.read_text(encoding="ascii").splitlines()]
    except OSError as error:
        raise DataError(
            f"the package names is not the one of the census ({error}): pip install names==0.3.0"
        ) from error


def encode(name: str) -> list[int]:
    """Return the tokens of a name, padded."""
    tokens = [1 + LETTERS.index(letter) for letter in name] + [END]
    return tokens + [0] * (LENGTH - len(tokens))


def names() -> tuple[Tensor, Tensor]:
    """Return tokens and classes of all names, in a fixed order."""
    classes = lists()
    x = torch.tensor([encode(name) for own in classes for name in own])
    y = torch.cat([torch.full((len(own),), label) for label, own in enumerate(classes)])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1990))
    return x[order], y[order]


class Reader(nn.Module):
    """A causal transformer over letters; the class scores are read at the end of the name.

    A position attends only to itself and earlier ones, so padding has no effect.
    """

    def __init__(self, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(END + 1, width), nn.Embedding(LENGTH, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores at the end of each name."""
        hidden = self.tokens(x) + self.positions.weight
        with twice_differentiable():
            hidden = self.blocks(hidden)
        ends = (x == END).int().argmax(1)
        y: Tensor = self.head(self.norm(hidden[torch.arange(len(x)), ends]))
        return y
