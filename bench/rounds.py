"""Rounds in which contenders take turns."""

from __future__ import annotations

import gc
from collections.abc import Iterator

WARM_UP = 2
"""Number of rounds that are not measured."""


def rounds(repeats: int) -> Iterator[int]:
    """Yield the rounds of warm-up, numbered below zero, then the measured rounds, from 0.

    Python's garbage collector stays on, as in training, so objects that a step makes count. Older objects are frozen,
    and garbage is collected before each round. So no step pays for the modules of the process or for another's garbage.
    """
    gc.collect()
    gc.freeze()
    try:
        for i in range(-WARM_UP, repeats):
            gc.collect()
            yield i
    finally:
        gc.unfreeze()
