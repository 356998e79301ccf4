"""Several torch optimizers as one: Muon for the matrices, AdamW for the rest."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .saved import groups_in, with_groups


class Chain(Optimizer):
    """Torch optimizers over disjoint parameters, which step one after the other.

    It has no groups and no state of its own: ``param_groups`` are those of its members, in their order, and ``state``
    is theirs. So schedulers see all groups, and a ``state_dict`` has torch's layout over all of them. One member's own
    checkpoint is loaded by ``chain.members[i].load_state_dict(...)``.

    Args:
        members: the optimizers.

    Raises:
        ValueError: a parameter belongs to two members; there is no member.
        TypeError: a member is no torch optimizer, or is a chain.

    >>> matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    >>> chain = Chain([torch.optim.SGD([matrix], lr=0.1), torch.optim.AdamW([bias], lr=0.01)])
    >>> [group["lr"] for group in chain.param_groups]
    [0.1, 0.01]
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        for member in members:
            if not isinstance(member, Optimizer) or isinstance(member, Chain):
                raise TypeError(
                    f"a list of base optimizers must hold instances of torch optimizers, got {_told(member)}: "
                    "construct each over its parameters, [Muon(matrices, lr=0.02), AdamW(rest, lr=1e-3)]"
                )
        if not members:
            raise ValueError("a list of base optimizers must hold at least one")
        self.members = tuple(members)
        self._checked = -1
        shared = set.intersection(*(set(member.defaults) for member in members))
        # Optimizer's constructor would make groups and state of its own
        super().__setstate__(
            {"defaults": {key: members[0].defaults[key] for key in members[0].defaults if key in shared}}
        )
        self._check(self.param_groups)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all members."""
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
        """The state by parameter, of all members."""
        return _State(self)

    @state.setter
    def state(self, state: Any) -> None:
        for member in self.members:
            own = {param for group in member.param_groups for param in group["params"]}
            member.state = defaultdict(dict, {key: value for key, value in state.items() if key in own})

    def _check(self, groups: Sequence[dict[str, Any]]) -> None:
        """Groups may have been added to a member."""
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
        """The groups by member."""
        counts = [len(member.param_groups) for member in self.members]
        if len(groups) != sum(counts):
            raise ValueError(
                f"{len(groups)} parameter groups for base optimizers that have {' + '.join(map(str, counts))}"
            )
        left = iter(groups)
        return [[next(left) for _ in range(count)] for count in counts]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of each member."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            member.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: only a member can be told.

        Raises:
            RuntimeError: always.
        """
        names = ", ".join(f"{i}: {type(member).__name__}" for i, member in enumerate(self.members))
        raise RuntimeError(
            f"add_param_group() does not know which of several base optimizers ({names}) is to have the group: call "
            "add_param_group() of that one, which shares its groups with this optimizer"
        )

    def state_dict(self) -> dict[str, Any]:
        """The members' states in one, with parameters numbered through all groups."""
        out: dict[str, Any] = {"state": {}, "param_groups": []}
        rests, start = [], 0
        for member in self.members:
            found = member.state_dict()
            groups = groups_in(found)
            if groups is None or not {"state", "param_groups"} <= found.keys():  # a wrapper, which nests them
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
        """Load what :meth:`state_dict` gave.

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
    """The state of all members of a chain, as one mapping that they share."""

    def __init__(self, chain: Chain) -> None:
        self._members = chain.members

    def _of(self, param: Tensor) -> dict[Tensor, Any]:
        """The state of the member that has the parameter."""
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
    """The optimizers that ``base`` consists of: itself, unless it is a chain.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    >>> members(optimizer) == members(Chain([optimizer])) == (optimizer,)
    True
    """
    return base.members if isinstance(base, Chain) else (base,)


def _holds(group: dict[str, Any], param: Tensor) -> bool:
    return any(param is each for each in group["params"])


def _numbered(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups as a state dict has them."""
    numbers = count()
    return [{**group, "params": [next(numbers) for _ in group["params"]]} for group in groups]


def _told(value: object) -> str:
    return "a chain of them" if isinstance(value, Chain) else f"{value!r:.100}"
