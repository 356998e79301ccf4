"""The leading rows of a batch, whatever it is made of."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor

_PLAIN = (str, bytes, int, float, type(None))


def is_array(value: Any) -> bool:
    """Whether it has rows: a tensor, or an array of NumPy's kind, of at least one dimension."""
    if isinstance(value, Tensor):
        return value.dim() > 0
    return hasattr(value, "__array__") and len(getattr(value, "shape", ())) > 0


def leading(batch: Any, count: Callable[[int], int]) -> Any:
    """``batch`` with the first ``count(n)`` of the ``n`` rows of everything in it that has rows.

    Those are tensors and arrays, in mappings, lists, tuples and dataclasses, nested as they like; lists and tuples of
    plain values (such as strings) that are as long; all else stays as it is, tensors without dimensions too. Nothing is
    copied: tensors are views.

    Raises:
        ValueError: tensors of different lengths.
        TypeError: there is nothing that has rows.

    >>> import torch
    >>> leading({"x": torch.arange(6).view(3, 2), "name": ["a", "b", "c"], "scale": 2.0}, lambda n: n - 1)
    {'x': tensor([[0, 1],
            [2, 3]]), 'name': ['a', 'b'], 'scale': 2.0}
    """
    shapes = list(_shapes(batch))
    lengths = sorted({shape[0] for shape in shapes})
    if len(lengths) > 1:
        raise ValueError(
            f"the tensors of a batch must have one number of rows, got shapes {', '.join(map(str, shapes))}: which of "
            "them belong to the first rows cannot be told. Take the rows yourself: x[:turn.count(len(x))]"
        )
    if not lengths:
        lengths = [len(values) for values in _columns(batch)][:1]
    if not lengths:
        raise TypeError(
            f"there is no tensor with rows in {type(batch).__name__} {batch!r:.80}: a batch is tensors, or mappings, "
            "lists, tuples or dataclasses of them. Take the rows of anything else yourself: x[:turn.count(len(x))]"
        )
    return _cut(batch, lengths[0], count(lengths[0]))


def _parts(value: Any) -> list[Any]:
    """What a container contains; of anything else, nothing."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []


def _shapes(value: Any) -> Iterator[tuple[int, ...]]:
    if is_array(value):
        yield tuple(value.shape)
        return
    for part in _parts(value):
        yield from _shapes(part)


def _is_column(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(entry, _PLAIN) for entry in value)


def _columns(value: Any) -> Iterator[Any]:
    if _is_column(value):
        yield value
        return
    for part in _parts(value):
        yield from _columns(part)


def _cut(value: Any, rows: int, keep: int) -> Any:
    if is_array(value):
        return value[:keep]
    if _is_column(value):
        return value[:keep] if len(value) == rows else value
    if isinstance(value, Mapping):
        found = {key: _cut(part, rows, keep) for key, part in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return found
        out = copy.copy(value)
        out.update(found)
        return out
    if isinstance(value, list | tuple):
        items = [_cut(part, rows, keep) for part in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: _cut(getattr(value, name), rows, keep) for name in names})
    return value
