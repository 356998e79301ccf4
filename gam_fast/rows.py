"""Take the leading rows of a batch of any structure."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_MEND = "take its rows yourself: x[:turn.count(len(x))]"


def is_array(value: Any) -> bool:
    """Return whether ``value`` has rows: a tensor or NumPy-like array of at least one dimension."""
    if isinstance(value, Tensor):
        return value.dim() > 0
    return hasattr(value, "__array__") and len(getattr(value, "shape", ())) > 0


def leading(batch: Any, count: Callable[[int], int]) -> Any:
    """Return ``batch`` with the first ``count(n)`` of its ``n`` rows.

    Tensors and arrays have rows, and all must have the same number. They may be nested in mappings, lists, tuples and
    dataclasses. A list of tensors consists of the parts of a batch, as a ``DataLoader`` collates it. A list (or a tuple
    of strings) without any array has one entry per row. Everything else stays as it is: numbers, strings, tuples of
    numbers, tensors without dimensions. Nothing is copied: tensors are views.

    Raises:
        ValueError: tensors of different lengths; a list whose length is not the number of rows; a list of examples,
            each a tuple.
        TypeError: nothing has rows, or an object with rows cannot be cut.

    >>> import torch
    >>> leading({"x": torch.arange(6).view(3, 2), "name": ["a", "b", "c"], "scale": 2.0}, lambda n: n - 1)
    {'x': tensor([[0, 1],
            [2, 3]]), 'name': ['a', 'b'], 'scale': 2.0}
    """
    rows, is_usual = _rows_of(batch)
    keep = count(rows)
    return tuple([part[:keep] for part in batch]) if is_usual else _cut(batch, rows, keep)


def rows_of(batch: Any) -> int:
    """Return the number of rows of ``batch``. Raises the errors of :func:`leading`, for the same batches."""
    return _rows_of(batch)[0]


def _rows_of(batch: Any) -> tuple[int, bool]:
    """Return the number of rows, and whether ``batch`` is a tuple of tensors, the common case; others take 50 µs."""
    if type(batch) is tuple and all(map(_is_usual, batch)) and len(rows := set(map(len, batch))) == 1:
        return rows.pop(), True
    shapes = list(_shapes(batch))
    lengths = sorted({shape[0] for shape in shapes})
    if len(lengths) > 1:
        raise ValueError(
            f"the tensors of a batch must have one number of rows, got shapes {', '.join(map(str, shapes))}: which of "
            f"them are parts of the batch is unknown. For such a batch, {_MEND}"
        )
    if not lengths:
        lengths = [len(values) for values in _columns(batch)][:1]
    if not lengths:
        raise TypeError(
            f"there is no tensor with rows in {type(batch).__name__} {batch!r:.80}: a batch is tensors, or mappings, "
            f"lists, tuples or dataclasses of them. For anything else, {_MEND}"
        )
    return lengths[0], False


def _is_usual(value: Any) -> bool:
    return type(value) is Tensor and value.dim() > 0 and value.layout is torch.strided


def _parts(value: Any) -> list[Any]:
    """Return the contents of a container; an empty list for anything else."""
    if isinstance(value, PackedSequence):
        raise TypeError(f"a PackedSequence has no rows to cut: pack the result of turn.rows(), or {_MEND}")
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []


def _shapes(value: Any) -> Iterator[tuple[int, ...]]:
    if is_array(value):
        yield tuple(value.shape)
        return
    parts = _parts(value)
    shapes = [list(_shapes(part)) for part in parts]
    if isinstance(value, list) and parts and all(type(part) is tuple for part in parts) and any(shapes):
        raise ValueError(f"a list of tuples is a list of examples and not a batch: collate it first, or {_MEND}")
    for found in shapes:
        yield from found


def _is_column(value: Any) -> bool:
    """Return whether ``value`` has one entry per row: a sequence without arrays, not a tuple of numbers."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value or any(_shapes(value)):
        return False
    return not isinstance(value, tuple) or all(isinstance(entry, str | bytes) for entry in value)


def _columns(value: Any) -> Iterator[Any]:
    if _is_column(value):
        yield value
        return
    for part in _parts(value):
        yield from _columns(part)


def _cut(value: Any, rows: int, keep: int) -> Any:
    try:
        if is_array(value):
            return value[:keep]
        if _is_column(value):
            if len(value) != rows:
                raise ValueError(
                    f"a list of {len(value)} among tensors of {rows} rows: {value!r:.80} has not one entry per row. "
                    f"Leave it out of what turn.rows() is given, or {_MEND}"
                )
            return value[:keep]
        return _rebuilt(value, rows, keep)
    except (TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        if _MEND in str(error):
            raise
        why = str(error).partition(". ")[0].partition("\n")[0]  # torch then lists all its dispatch keys
        raise TypeError(f"the rows of a {type(value).__name__} cannot be taken ({why}): {_MEND}") from error


def _rebuilt(value: Any, rows: int, keep: int) -> Any:
    """Return a container of the same kind with its contents cut."""
    if isinstance(value, Mapping):
        found = {key: _cut(part, rows, keep) for key, part in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return found
        out = copy.copy(value)
        for key, part in found.items():
            out[key] = part
        return out
    if isinstance(value, list | tuple):
        if all(not _has_rows(part) for part in value):
            return value
        items = [_cut(part, rows, keep) for part in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: _cut(getattr(value, name), rows, keep) for name in names})
    return value


def _has_rows(value: Any) -> bool:
    return any(_shapes(value)) or any(map(bool, _columns(value)))
