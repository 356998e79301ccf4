"""Names of the United States census of 1990, and a small transformer that tells from the letters what a name is.

The lists are data files of the PyPI package ``names``; nothing is downloaded. Three classes: first names of women,
first names of men, and the most frequent surnames. The classes have no name in common: what is both a woman's and a
man's first name is left out, and what is anybody's first name is no surname.
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
"""The token after the last letter; 0 fills up behind it, letters are from 1 on."""

LENGTH = 14
"""Tokens of a name: the longest has 13 letters."""


def lists() -> tuple[list[str], ...]:
    """Names of each class, without those that are in two, the most frequent first.

    Raises:
        DataError: the package is not installed, or has other files.
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
    """The first word of each line."""
    try:
        return [line.split()[0] for line in path.read_text(encoding="ascii").splitlines()]
    except OSError as error:
        raise DataError(
            f"the package names is not the one of the census ({error}): pip install names==0.3.0"
        ) from error


def encode(name: str) -> list[int]:
    """Its tokens, filled up."""
    tokens = [1 + LETTERS.index(letter) for letter in name] + [END]
    return tokens + [0] * (LENGTH - len(tokens))


def names() -> tuple[Tensor, Tensor]:
    """Tokens and classes of all names, in an order that is always the same."""
    classes = lists()
    x = torch.tensor([encode(name) for own in classes for name in own])
    y = torch.cat([torch.full((len(own),), label) for label, own in enumerate(classes)])
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1990))
    return x[order], y[order]


class Reader(nn.Module):
    """A causal transformer over letters; what it says of a name is read where the name ends.

    A position attends to none after it, so that what fills up a name has no effect.
    """

    def __init__(self, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(END + 1, width), nn.Embedding(LENGTH, width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.positions.weight
        with twice_differentiable():
            hidden = self.blocks(hidden)
        ends = (x == END).int().argmax(1)
        y: Tensor = self.head(self.norm(hidden[torch.arange(len(x)), ends]))
        return y
