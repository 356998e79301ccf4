"""Rounds in which those that are compared take turns."""

from __future__ import annotations

import gc
from collections.abc import Iterator

WARM_UP = 2
"""Rounds that are not measured."""


def rounds(repeats: int) -> Iterator[int]:
    """The rounds of warm-up, numbered below zero, then those that are measured, from 0.

    Python's garbage collector stays on, as in training: objects that a step makes count. What lived before is frozen,
    and garbage is collected before each round, so that nobody's step pays for the modules of the process or for what
    another has left.
    """
    gc.collect()
    gc.freeze()
    try:
        for i in range(-WARM_UP, repeats):
            gc.collect()
            yield i
    finally:
        gc.unfreeze()
