"""Parts of a loss: groups of parameters, batches and their weights, and state that reading the data may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def grouped(params: Any) -> dict[str, list[Tensor]]:
    """Return parameters by group name, from parameters, named parameters or groups."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, got one tensor: write [tensor]")
    if isinstance(params, Mapping):
        return {str(name): list(group) for name, group in params.items()}
    entries = list(params)
    if entries and all(isinstance(entry, Mapping) for entry in entries):
        return {str(entry.get("name", i)): list(entry["params"]) for i, entry in enumerate(entries)}
    return {"all": [entry[1] if isinstance(entry, tuple) else entry for entry in entries]}


def loss_of(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], x: Any, target: Any) -> Tensor:
    """Return the loss of one batch."""
    if isinstance(x, Mapping):
        return loss_fn(model(**x), target)
    return loss_fn(model(*x) if isinstance(x, tuple | list) else model(x), target)


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in ``value`` to ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([to_device(entry, device) for entry in value]) if type(value) in (tuple, list) else value
    return value


def length(*values: Any) -> float:
    """Return the length of the first tensor in ``values`` that has one."""
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return float(len(value))
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, tuple | list) and value:
            return length(*value)
    raise ValueError("the number of examples in a batch cannot be told from its tensors: give count=")


def count_of(loss_fn: Any, target: Any, x: Any) -> float:
    """Return the number that the loss of a batch was divided by."""
    if (
        isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss)
        and isinstance(target, Tensor)
        and target.dtype == torch.int64
    ):
        kept = target[target != loss_fn.ignore_index]
        return float(kept.numel() if loss_fn.weight is None else loss_fn.weight[kept].sum())
    return length(target, x)


def generators_of(data: Any) -> list[torch.Generator]:
    """Return the generators of a DataLoader and its samplers, besides torch's default ones."""
    places = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    places.append(getattr(places[-1], "sampler", None))
    found = [getattr(place, "generator", None) for place in places]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def buffers_of(model: nn.Module | None) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Return all buffers of a model, with copies."""
    modules = [] if model is None else list(model.modules())
    return [
        (module, name, buffer, buffer.detach().clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


@torch.no_grad()
def put_back(buffers: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    """Put the same buffers back in place, with their old values."""
    for module, name, buffer, saved in buffers:
        module._buffers[name] = buffer
        buffer.copy_(saved)


def differentiable(loss: Tensor) -> Tensor:
    """Return ``loss`` if it is one number that depends on a parameter; raise otherwise."""
    if not checked(loss).requires_grad:
        raise ValueError(
            "the loss does not depend on a parameter that requires a gradient: it is constant or detached, or computed "
            "under torch.no_grad()"
        )
    return loss


def checked(loss: Tensor) -> Tensor:
    """Return ``loss`` if it is a tensor of one element; raise otherwise."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(f"the loss of a batch must be a tensor of one element, got {given}")
    return loss
