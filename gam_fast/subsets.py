"""Split parameters into a perturbed group and a group that stays in place, or into one group per layer.

A group with ``perturb=False`` stays at θ in every pass. Norms are over the other groups, and only these are backed up.
All groups get the final direction. The functions here choose the perturbed parameters by kind or name.

Except for :func:`layers`, they return two parameter groups, or one if there is nothing else to train, and raise
``ValueError`` if there is nothing to perturb. Parameters that do not require a gradient are left out. You may add other
keys to the groups:

>>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.LayerNorm(4))
>>> perturbed, rest = normalization(model)
>>> perturbed["weight_decay"] = 0.0
>>> [len(group["params"]) for group in (perturbed, rest)], rest["perturb"]
([2, 2], False)
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .parameters import PERTURB


def normalization(model: nn.Module) -> list[dict[str, Any]]:
    """Perturb the parameters of normalisation layers: of modules whose class has "norm" in its name.

    Custom layers such as ``RMSNorm`` and ``LayerNorm2d`` count.

    Source: Müller, Vlaar, Rolnick, Hein, *Normalization Layers Are All That Sharpness-Aware Minimization Needs*,
    NeurIPS 2023, arXiv 2306.04226.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    >>> [tuple(p.shape) for p in normalization(model)[0]["params"]]
    [(2,), (2,)]
    """
    layers = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    chosen = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    return _groups(model, chosen, "parameter of a normalisation layer")


def matrices(model: nn.Module) -> list[dict[str, Any]]:
    """Perturb parameters of two and more dimensions: no biases, and no scales of normalisation layers.

    >>> [tuple(p.shape) for p in matrices(torch.nn.Linear(3, 2))[0]["params"]]
    [(2, 3)]
    """
    return _groups(model, {id(p) for p in model.parameters() if p.ndim >= 2}, "parameter of two dimensions or more")


def lora(model: nn.Module) -> list[dict[str, Any]]:
    """Perturb the adapters that ``peft.get_peft_model`` has put into a model: parameters with ``lora_`` in their name.

    >>> layer = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(4, 1, bias=False), "head": torch.nn.Linear(4, 2)})
    >>> [tuple(p.shape) for p in lora(layer)[0]["params"]]
    [(1, 4)]
    """
    return named(model, "*lora_*")


def named(model: nn.Module, *patterns: str) -> list[dict[str, Any]]:
    """Perturb the parameters whose names match one of the patterns.

    Args:
        model: the model.
        patterns: patterns of :mod:`fnmatch`, for the names in ``model.named_parameters()``.

    Raises:
        ValueError: a pattern matches no parameter that requires a gradient.
        TypeError: a pattern is not a string.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    >>> [tuple(p.shape) for p in named(model, "1.*")[0]["params"]]
    [(1, 2), (1,)]
    """
    chosen: set[int] = set()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be a string, got {pattern!r}")
        found = {id(p) for name, p in trained.items() if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(
                f"no parameter to train has a name like {pattern!r}; names are {', '.join(list(trained)[:8])}"
                f"{', …' if len(trained) > 8 else ''}"
            )
        chosen |= found
    return _groups(model, chosen, "parameter to perturb")


def layers(model: nn.Module) -> list[dict[str, Any]]:
    """Make one group per layer, that is, per module with its own parameters.

    With ``norm="group"`` each layer is then perturbed by the whole radius along its own part of the gradient. A
    parameter that several modules share belongs to the first. To leave a layer in place, set ``group["perturb"] =
    False``.

    Args:
        model: the model.

    Returns:
        One parameter group per layer, in the order of ``model.modules()``.

    Raises:
        ValueError: there is no parameter that requires a gradient.

    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.LayerNorm(4))
    >>> [[tuple(p.shape) for p in group["params"]] for group in layers(model)]
    [[(4, 2), (4,)], [(4,), (4,)]]
    """
    seen: set[int] = set()
    groups = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen.update(map(id, own))
        if own:
            groups.append({"params": own})
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
    return groups


def _groups(model: nn.Module, chosen: set[int], what: str) -> list[dict[str, Any]]:
    params = [p for p in model.parameters() if p.requires_grad]
    perturbed: list[torch.Tensor] = [p for p in params if id(p) in chosen]
    if not perturbed:
        raise ValueError(f"{type(model).__name__} has no {what} that requires a gradient")
    rest = [p for p in params if id(p) not in chosen]
    return [{"params": perturbed}, *([{"params": rest, PERTURB: False}] if rest else [])]
