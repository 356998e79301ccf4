"""What outlives an optimizer: the parameter groups in the state dict of any base, and the model of a copy."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

METHOD = "flat_method"
"""The key in the ``param_groups`` of a state dict that names the method it is of."""


def groups_in(state_dict: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The parameter groups of a state dict, also of a wrapper that nests the one of its inner optimizer.

    >>> groups_in({"slow": {}, "inner": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}})
    [{'lr': 0.1, 'params': [0]}]
    >>> groups_in({"everything": 1}) is None
    True
    """
    found = state_dict.get("param_groups")
    if isinstance(found, list | tuple) and all(isinstance(group, dict) for group in found):
        return list(found)
    inner = (groups_in(value) for value in state_dict.values() if isinstance(value, dict))
    return next((groups for groups in inner if groups is not None), None)


def with_groups(state_dict: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state dict with these in place of what :func:`groups_in` finds; what it was given stays as it is.

    >>> with_groups({"inner": {"param_groups": [{"lr": 0.1}]}}, [{"lr": 0.2}])
    {'inner': {'param_groups': [{'lr': 0.2}]}}
    """
    if groups_in({"param_groups": state_dict.get("param_groups")}) is not None:
        return {**state_dict, "param_groups": list(groups)}
    for key, value in state_dict.items():
        if isinstance(value, dict) and groups_in(value) is not None:
            return {**state_dict, key: with_groups(value, groups)}
    return state_dict


def merged(
    groups: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]], method: str, hyper: Collection[str]
) -> tuple[list[dict[str, Any]], str | None]:
    """The groups of a state dict, completed by the values in force, and the name of the method if it is another.

    Args:
        groups: as they were saved.
        own: for each group that there is, the values in force that a plain base optimizer does not save.
        method: the name of the method that loads them.
        hyper: the keys of its hyper-parameters. They stay as they are where the groups are of another method.

    >>> merged([{"rho": 0.05, "lr": 0.1, "flat_method": "SAM"}], [{"rho": 0.2}], "GAM", ["rho"])
    ([{'rho': 0.2, 'lr': 0.1}], 'SAM')
    """
    names = [group.get(METHOD) for group in groups]
    other = next((name for name in names if name not in (None, method)), None)
    if not any(names) and any(0 < len(group.keys() & set(hyper)) < len(hyper) for group in groups):
        other = "another method"  # of 0.7.0 or another package, which do not name it
    found = []
    for i, group in enumerate(groups):
        kept = own[i] if i < len(own) else {}
        unwanted = {METHOD, *hyper} if other is not None else {METHOD}
        found.append({**kept, **{key: value for key, value in group.items() if key not in unwanted}})
    return found, other


def tell_of_another(other: str, method: str, groups: Sequence[dict[str, Any]], hyper: Collection[str]) -> None:
    """Log that the hyper-parameters of the method were kept when the state of another was loaded."""
    if hyper and groups:
        values = ", ".join(f"{key}={groups[0].get(key)!r}" for key in hyper)
        of_first = " (of the first group)" if len(groups) > 1 else ""
        _LOG.warning("loaded a state of %s into %s, which keeps its own %s%s", other, method, values, of_first)


_LOG = logging.getLogger("gam_fast")


class ModelOfCopy:
    """Stands for the module of an optimizer that is copied or pickled, without being a copy of it.

    A deep copy refers to the copy of the module if that was made in the same call before. A pickle holds no more than
    the name of the module's class; :meth:`find` looks for the module that came with the parameters.

    Args:
        module: the module, if it is known.
        name: the name of its class.
        matters: whether steps without it would go wrong without a sign: it has buffers, or synchronises processes.
    """

    def __init__(self, module: nn.Module | None, name: str, matters: bool) -> None:
        self.module = module
        self.name = name
        self.matters = matters

    @classmethod
    def of(cls, module: nn.Module | None, *, matters: bool) -> ModelOfCopy | None:
        """For an optimizer with this ``model``; ``matters`` besides where it has buffers."""
        if module is None:
            return None
        return cls(module, type(module).__qualname__, matters or next(module.buffers(), None) is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelOfCopy:
        return ModelOfCopy(memo.get(id(self.module)), self.name, self.matters)

    def __reduce__(self) -> tuple[Callable[..., ModelOfCopy], tuple[None, str, bool]]:
        return ModelOfCopy, (None, self.name, self.matters)

    def find(self, params: Iterable[Tensor]) -> nn.Module | None:
        """The module in memory that holds the most of the parameters; of several one of the right name, then the least.

        >>> model = nn.Sequential(nn.Linear(2, 1))
        >>> ModelOfCopy(None, "Sequential", matters=True).find(model.parameters()) is model
        True
        """
        if self.module is not None:
            return self.module
        ours = {id(param) for param in params}
        best: tuple[tuple[int, bool, int], nn.Module | None] = ((0, False, 0), None)
        for module in gc.get_objects():
            if issubclass(type(module), nn.Module) and "_parameters" in vars(module):
                theirs = {id(param) for param in module.parameters()}
                rank = (len(ours & theirs), type(module).__qualname__ == self.name, -sum(1 for _ in module.modules()))
                if rank[0] and rank > best[0]:
                    best = rank, module
        return best[1]
