"""The base optimizer and its parameter groups, also as they are in state dicts.

It is a class with its arguments, an instance, or a list of instances (Muon for the matrices, AdamW for the rest).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import count
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from .hooks import Hooked
from .recipe import MEMORIES

Given: TypeAlias = "Optimizer | list[Optimizer] | tuple[Optimizer, ...] | Callable[..., Optimizer]"
"""A base optimizer as the user gives it."""

METHOD = "flat_method"
"""The key in the ``param_groups`` of a state dict for the name of the method that saved it."""

_FILLED = "_gam_fast_filled"
"""The attribute of a base optimizer that holds, per group, the keys which an optimizer around it has added."""

_LOG = logging.getLogger("gam_fast")


def build_base(params: Iterable[Any] | None, base_optimizer: Given, arguments: dict[str, Any]) -> Optimizer:
    """Return the base optimizer of ``params`` (``None`` with an instance). The optimizer around it documents errors."""
    if isinstance(base_optimizer, list | tuple):
        chain = Chain(base_optimizer)
        base_optimizer = chain if len(chain.members) > 1 else chain.members[0]
    if isinstance(base_optimizer, Optimizer):
        base = base_optimizer
        if arguments:
            raise TypeError(
                f"unexpected arguments {', '.join(sorted(arguments))}: base_optimizer is an instance or several, which "
                "have their own"
            )
        if params is not None and _ids(params) != _ids(base.param_groups):
            raise ValueError("base_optimizer is an instance over other parameters than params; pass params=None")
    elif callable(base_optimizer):
        if params is None:
            raise TypeError("params may be None only with an instance of an optimizer as base_optimizer")
        base = base_optimizer(params, **arguments)
    else:
        raise TypeError(f"base_optimizer must be a torch optimizer class or instance, got {base_optimizer!r}")
    for member in members(base):
        _check(member)
    return base


def _check(base: Optimizer) -> None:
    if not isinstance(base, Optimizer) or isinstance(base, Hooked):
        raise TypeError(f"base_optimizer must make a torch optimizer that is not one of gam_fast, got {base!r}")
    is_sparse = isinstance(base, torch.optim.SparseAdam)
    if is_sparse or isinstance(base, torch.optim.LBFGS) or _needs_closure(base):
        why = "needs sparse gradients" if is_sparse else "evaluates its own closure"
        raise TypeError(
            f"{type(base).__name__} cannot be the base optimizer, because it {why}; use SGD, AdamW or another"
        )
    if not hasattr(base, "defaults"):
        raise TypeError(
            f"{type(base).__name__} cannot be the base optimizer, because it lacks what torch.optim.Optimizer gives "
            "each optimizer (defaults); if it wraps another, as PostLocalSGDOptimizer does, pass that one, and average "
            "the weights after the step"
        )
    if getattr(base, "_overlap_with_ddp", False):
        raise TypeError(
            f"{type(base).__name__} with overlap_with_ddp=True cannot be the base optimizer, because it steps in the "
            "backward pass; leave that out"
        )


def _needs_closure(base: Optimizer) -> bool:
    """Return whether ``base.step()`` cannot be called without arguments."""
    try:
        inspect.signature(base.step).bind()
    except TypeError:
        return True
    except ValueError:  # a builtin has no signature
        pass
    return False


@contextlib.contextmanager
def without_memories(state: MutableMapping[Any, dict[str, Any]], names: Collection[str] = MEMORIES) -> Iterator[None]:
    """Hide states of such memories only: the base optimizer creates its state where it finds none."""
    alone = [key for key, own in state.items() if isinstance(own, dict) and own and own.keys() <= set(names)]
    hidden = {param: state.pop(param) for param in alone}
    try:
        yield
    finally:
        for param, own in hidden.items():
            state[param].update(own)


def ascends(base: Optimizer) -> bool:
    """Return whether ``base`` maximizes by an attribute of its own, as optimizers of pytorch-optimizer do."""
    return any(getattr(member, "maximize", False) is True for member in members(base))


def with_signs(base: Optimizer) -> list[dict[str, Any]]:
    """Return the parameter groups, each with the ``maximize`` that its optimizer uses."""
    return [
        {"maximize": getattr(member, "maximize", False) is True, **group}
        for member in members(base)
        for group in member.param_groups
    ]


def filled(base: Optimizer) -> list[set[str]]:
    """Return, for each group, the set of keys that optimizers around ``base`` have added. Callers may extend it.

    The sets are not in the ``state_dict``.

    >>> base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
    >>> filled(base)[0].add("rho")
    >>> filled(base)
    [{'rho'}]
    """
    found: list[set[str]] = []
    for member in members(base):
        record: list[set[str]] = vars(member).setdefault(_FILLED, [])
        record.extend(set() for _ in member.param_groups[len(record) :])
        found += record
    return found


def left_behind(base: Optimizer, explicit: Mapping[str, Any]) -> list[set[str]]:
    """Return, for each group, the keys that an earlier optimizer around ``base`` has left and that no longer count.

    If ``base`` was copied or pickled, these keys are not known. A value that all groups share then counts as left
    behind if ``explicit`` has a value to replace it.
    """
    found = [set(keys) for keys in filled(base)]
    for key in explicit:
        values = [group.get(key) for group in base.param_groups]
        if values[0] is not None and all(value == values[0] for value in values):
            found = [{*keys, key} for keys in found]
    return found


def _ids(params: Iterable[Any]) -> set[int]:
    found = set()
    for entry in params:
        values = entry["params"] if isinstance(entry, dict) else [entry]
        values = [values] if isinstance(values, Tensor) else values
        found |= {id(value[1] if isinstance(value, tuple) else value) for value in values}
    return found


class Chain(Optimizer):
    """Several torch optimizers over disjoint parameters, which step one after the other.

    A chain has no groups or state of its own: its ``param_groups`` and ``state`` are those of its members, in order. So
    schedulers see all groups, and a ``state_dict`` has torch's layout over all of them. To load the checkpoint of a
    single member, call ``chain.members[i].load_state_dict(...)``.

    Args:
        members: the optimizers.

    Raises:
        ValueError: a parameter belongs to two members; there is no member.
        TypeError: a member is not a torch optimizer, or is a chain.

    >>> matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    >>> chain = Chain([torch.optim.SGD([matrix], lr=0.1), torch.optim.AdamW([bias], lr=0.01)])
    >>> [group["lr"] for group in chain.param_groups]
    [0.1, 0.01]
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        for member in members:
            if not isinstance(member, Optimizer) or isinstance(member, Chain):
                found = "a chain of them" if isinstance(member, Chain) else f"{member!r:.100}"
                raise TypeError(
                    f"a list of base optimizers must hold instances of torch optimizers, got {found}: "
                    "construct each over its parameters, [Muon(matrices, lr=0.02), AdamW(rest, lr=1e-3)]"
                )
        if not members:
            raise ValueError("a list of base optimizers must hold at least one")
        self.members = tuple(members)
        self._checked = -1
        first, *others = (vars(member).get("defaults", {}) for member in members)
        shared = {key: value for key, value in first.items() if all(key in defaults for defaults in others)}
        # Optimizer's constructor would create groups and state
        super().__setstate__({"defaults": shared})
        self._check(self.param_groups)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all members, in their order."""
        groups = [group for member in self.members for group in member.param_groups]
        if len(groups) != self._checked:
            self._check(groups)
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        for member, part in zip(self.members, self._parts(groups), strict=True):
            member.param_groups = part

    @property
    def state(self) -> Any:
        """The state of all members, by parameter."""
        return _State(self)

    @state.setter
    def state(self, state: Any) -> None:
        for member in self.members:
            own = {param for group in member.param_groups for param in group["params"]}
            member.state = defaultdict(dict, {key: value for key, value in state.items() if key in own})

    def _check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Check that no parameter has two members, since groups may have been added to a member."""
        counts = Counter(param for group in groups for param in group["params"])
        for place, group in enumerate(groups):
            for i, param in enumerate(group["params"]):
                if counts[param] > 1:
                    name = f" ({group['param_names'][i]})" if "param_names" in group else ""
                    owners = [type(m).__name__ for m in self.members for g in m.param_groups if _holds(g, param)]
                    raise ValueError(
                        f"parameter {i} of group {place}{name}, of shape {tuple(param.shape)}, belongs to several base "
                        f"optimizers ({', '.join(owners)}): give each parameter to one of them"
                    )
        self._checked = len(groups)

    def _parts(self, groups: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Divide ``groups`` among the members."""
        counts = [len(member.param_groups) for member in self.members]
        if len(groups) != sum(counts):
            raise ValueError(
                f"{len(groups)} parameter groups for base optimizers that have {' + '.join(map(str, counts))}"
            )
        left = iter(groups)
        return [[next(left) for _ in range(count)] for count in counts]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call ``step`` of each member."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse to add a group: add it to a member instead.

        Raises:
            RuntimeError: always.
        """
        names = ", ".join(f"{i}: {type(member).__name__}" for i, member in enumerate(self.members))
        raise RuntimeError(
            f"add_param_group() does not know which of several base optimizers ({names}) is to have the group: call "
            "add_param_group() of that one, which shares its groups with this optimizer"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the members' states as one, with parameters numbered through all groups."""
        out: dict[str, Any] = {"state": {}, "param_groups": []}
        rests, start = [], 0
        for member in self.members:
            found = member.state_dict()
            groups = groups_in(found)
            if groups is None or not {"state", "param_groups"} <= found.keys():  # a wrapper nests them
                rests.append({"nested": found})
                found = {"state": {}, "param_groups": groups or _numbered(member.param_groups)}
            else:
                rests.append({})
            numbers = {n for group in found["param_groups"] for n in group["params"]}
            out["state"].update({start + n: value for n, value in found["state"].items() if n in numbers})
            out["param_groups"] += [
                {**group, "params": [start + n for n in group["params"]]} for group in found["param_groups"]
            ]
            rest = {key: value for key, value in found.items() if key not in out}
            other = {key: value for key, value in found["state"].items() if key not in numbers}
            rests[-1].update({**rest, **({"state": other} if other else {})})
            start += sum(len(group["params"]) for group in member.param_groups)
        return {**out, "members": rests} if any(rests) else out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of :meth:`state_dict`.

        Raises:
            ValueError: the groups do not fit; nothing is then changed.
        """
        parts = self._parts(state_dict["param_groups"])
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if len(mine["params"]) != len(saved["params"]):
                raise ValueError(
                    f"the state has a parameter group of {len(saved['params'])} parameters where this optimizer has "
                    f"one of {len(mine['params'])}: a list of base optimizers must have the order it was saved with"
                )
        rests = state_dict.get("members", [{}] * len(parts))
        start = 0
        for member, groups, rest in zip(self.members, parts, rests, strict=True):
            numbers = {n for group in groups for n in group["params"]}
            if "nested" in rest:
                own = [{**group, "params": [n - start for n in group["params"]]} for group in groups]
                member.load_state_dict(with_groups(rest["nested"], own))
            else:
                state = {n: value for n, value in state_dict["state"].items() if n in numbers}
                member.load_state_dict({**rest, "state": {**rest.get("state", {}), **state}, "param_groups": groups})
            start += len(numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "members": self.members, "_checked": self._checked}


class _State(MutableMapping[Tensor, Any]):
    """The states of all members of a chain as one mapping, which writes to the members' own."""

    def __init__(self, chain: Chain) -> None:
        self._members = chain.members

    def _of(self, param: Tensor) -> dict[Tensor, Any]:
        """Return the state of the member that has ``param``."""
        for member in self._members:
            if param in member.state or any(_holds(group, param) for group in member.param_groups):
                return member.state
        raise KeyError(param)

    def __getitem__(self, param: Tensor) -> Any:
        return self._of(param)[param]

    def __setitem__(self, param: Tensor, value: Any) -> None:
        self._of(param)[param] = value

    def __delitem__(self, param: Tensor) -> None:
        del self._of(param)[param]

    def __contains__(self, param: object) -> bool:
        return any(param in member.state for member in self._members)

    def __iter__(self) -> Iterator[Tensor]:
        for member in self._members:
            yield from member.state

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._members)


def members(base: Optimizer) -> tuple[Optimizer, ...]:
    """Return the members of a chain; for any other optimizer, the optimizer itself.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    >>> members(optimizer) == members(Chain([optimizer])) == (optimizer,)
    True
    """
    return base.members if isinstance(base, Chain) else (base,)


def _holds(group: dict[str, Any], param: Tensor) -> bool:
    return any(param is each for each in group["params"])


def _numbered(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups as in a state dict, with numbers in place of parameters."""
    numbers = count()
    return [{**group, "params": [next(numbers) for _ in group["params"]]} for group in groups]


def groups_in(state_dict: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Find the parameter groups of a state dict, also if a wrapper nests its inner optimizer's state.

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
    """Return a copy of the state dict in which ``groups`` replace those that :func:`groups_in` finds.

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
    """Return saved groups completed by current values, and the name of the saving method if it is another one.

    Args:
        groups: as they were saved.
        own: for each current group, its values that a plain base optimizer does not save.
        method: the name of the method that loads them.
        hyper: the keys of its hyper-parameters. If another method saved the groups, the current values of these keys
            stay.

    >>> merged([{"rho": 0.05, "lr": 0.1, "flat_method": "SAM"}], [{"rho": 0.2}], "GAM", ["rho"])
    ([{'rho': 0.2, 'lr': 0.1}], 'SAM')
    """
    names = [group.get(METHOD) for group in groups]
    other = next((name for name in names if name not in (None, method)), None)
    if not any(names) and any(0 < len(group.keys() & set(hyper)) < len(hyper) for group in groups):
        other = "another method"  # release 0.7.0 and other packages do not name it
    found = []
    for i, group in enumerate(groups):
        kept = own[i] if i < len(own) else {}
        unwanted = {METHOD, *hyper} if other is not None else {METHOD}
        found.append({**kept, **{key: value for key, value in group.items() if key not in unwanted}})
    return found, other


def tell_of_another(other: str, method: str, groups: Sequence[dict[str, Any]], hyper: Collection[str]) -> None:
    """Log that loading a state of another method left the hyper-parameters as they were."""
    if hyper and groups:
        values = ", ".join(f"{key}={groups[0].get(key)!r}" for key in hyper)
        of_first = " (of the first group)" if len(groups) > 1 else ""
        _LOG.warning("loaded a state of %s into %s, which keeps its own %s%s", other, method, values, of_first)
