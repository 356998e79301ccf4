"""The terms of a direction as kernels that are launched from Python take them."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Direction, TensorList
from .tables import Argument

MAX_TERMS = 3


@dataclass(frozen=True)
class Terms:
    """The terms of a direction that any group uses.

    Attributes:
        lists: the lists of tensors.
        numbers: by group, p, q and whether the group uses it, for each of them.
        partly: whether a group does not use all.
    """

    lists: list[TensorList]
    numbers: list[list[float]]
    partly: bool

    def arguments(self) -> list[Argument]:
        return [Argument(f"terms[{t}]", tensors) for t, tensors in enumerate(self.lists)]


def terms_of(d: Direction, groups: int, m: Direction | None = None) -> Terms:
    """Those of ``d``, where those that ``m`` uses count as used too; their elements may be anything in the others."""
    count = len(d.terms)
    if not 1 <= count <= MAX_TERMS:
        raise ValueError(f"terms must be 1 to {MAX_TERMS} lists of tensors, got {count}")
    coefficients = [d.p, *([d.q] if d.q else []), *([m.p] if m else [])]
    if any(len(rows) != count or min(map(len, rows)) < groups for rows in coefficients):
        raise ValueError(f"p and q must have {groups} numbers, one a parameter group, for each of {count} terms")
    used = [[any(c[t][g] != 0.0 for c in coefficients) for t in range(count)] for g in range(groups)]
    for row in used:
        row[0] = row[0] or not any(row)
    kept = [t for t in range(count) if any(row[t] for row in used)]
    numbers = [
        [x for t in kept for x in (d.p[t][g], d.q[t][g] if d.q else 0.0, 1.0 if row[t] else 0.0)]
        for g, row in enumerate(used)
    ]
    return Terms([d.terms[t] for t in kept], numbers, not all(row[t] for row in used for t in kept))
