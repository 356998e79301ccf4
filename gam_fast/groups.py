"""An optimizer around a base optimizer: it shares groups and state, and adds a recipe's hyper-parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import SGD, Optimizer

from . import bases, radius
from .active import COUNTS
from .bases import Given, ascends, build_base, filled, left_behind, members
from .hooks import Hooked
from .noise import DRAWS
from .options import check_arguments, check_keys, check_params
from .parameters import ADAPTIVE, PERTURB
from .progress import Progress
from .recipe import MOMENTUM, Recipe
from .recipes import BASE


class AroundBase(Hooked):
    """A torch optimizer that shares groups and state with its base optimizer, also when they are saved and loaded.

    The key of a hyper-parameter in ``param_groups`` is its name in the recipe, unless the base has a key of that name.
    """

    recipe: ClassVar[Recipe] = BASE
    _ascends: bool = False  # whether an attribute of the base, not its groups, says maximize
    _progress: Progress

    def _build(
        self, params: Iterable[Any] | None, base_optimizer: Given, given: set[str], hyper: dict[str, Any]
    ) -> list[set[str]]:
        """Make and check the base. Return, for each group, the keys that an earlier optimizer around it has left there.

        Args:
            params: as given to the constructor.
            base_optimizer: as given to the constructor.
            given: the names of the arguments that were given explicitly.
            hyper: hyper-parameters of the recipe, and the base's arguments.
        """
        own = {name: hyper.pop(name, default) for name, default in self.recipe.defaults.items()}
        for name, value in own.items():
            self.recipe.check(name, value)
            radius.is_auto(value)
        check_arguments(type(self).__name__, tuple(own), params, base_optimizer, hyper)
        self.base = build_base(params, base_optimizer, hyper)
        before = self.recipe.before
        keeps = self.recipe.memory is not None or (before is not None and before.along == MOMENTUM)
        if keeps and type(self.base).__name__ == "ZeroRedundancyOptimizer":
            raise ValueError(
                f"{self.recipe.name}: a ZeroRedundancyOptimizer has the state of only some parameters on each process, "
                "and this method needs a vector for all of them there: use fully_shard (FSDP2)"
            )
        self._ascends = ascends(self.base)
        prefix = self.recipe.name.lower()
        taken = {name for member in members(self.base) for name in member.defaults}
        self._keys = {name: f"{prefix}_{name}" if name in taken else name for name in own}
        self._own_defaults = {self._keys[name]: value for name, value in own.items()}
        chosen = {name for name, value in own.items() if name in given or value != self.recipe.defaults[name]}
        explicit = {self._keys[name]: own[name] for name in chosen}
        stale = left_behind(self.base, explicit if isinstance(base_optimizer, Optimizer | list | tuple) else {})
        groups = [
            {key: value for key, value in group.items() if key not in keys}
            for group, keys in zip(self.base.param_groups, stale, strict=True)
        ]
        for group in groups:
            self._check_group(group)
        self._check_difference(groups)
        return stale

    def _take_over(self, stale: list[set[str]]) -> None:
        """Write the hyper-parameters into the groups, in place of ``stale`` keys."""
        for group, keys, mine in zip(self.base.param_groups, stale, filled(self.base), strict=True):
            for key in keys:
                group.pop(key, None)
            mine.clear()
        self._complete_groups()
        # torch's constructor would create groups and state. Ours are those of the base optimizer (see the properties
        # below), so only its hooks and its profiling are set up, as torch does on unpickling.
        super().__setstate__({"defaults": {**self.base.defaults, **self._own_defaults}})

    # Shared with the base optimizer for good, also after load_state_dict has replaced it.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the base optimizer."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the base optimizer, by parameter."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    def key(self, name: str) -> str:
        """Return the key of hyper-parameter ``name`` in ``param_groups``: itself, unless the base has that key."""
        if name not in self._keys:
            raise ValueError(
                f"{self.recipe.name} has no hyper-parameter {name!r}; it has {', '.join(self._keys) or 'none'}"
            )
        return self._keys[name]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; hyper-parameters it does not set get the constructor's values."""
        self._refuse_nesting("add_param_group()")
        if isinstance(param_group, dict):
            if not isinstance(param_group["params"], Tensor | set):
                param_group["params"] = list(param_group["params"])
            self._check_group(param_group)
            self._check_difference([*self.param_groups, param_group])
        self.base.add_param_group(param_group)
        self._complete_groups()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state; its groups have the hyper-parameters and the method (``flat_method``).

        Raises:
            RuntimeError: in a pass after the first, because the model's weights are then perturbed.
        """
        step = self._progress.current
        if step is not None and step.perturbed:
            raise RuntimeError(
                f"state_dict() in a pass of {type(self).__name__} whose weights are perturbed (and the model's "
                "state_dict() holds those): save both after the loop over passes() or the closure"
            )
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        # A direction may be set before the base has made its state; SGD alone loads a state without its entries. A
        # step makes all other memories, and the base its state, if it has any.
        early = () if all(type(base) is SGD for base in members(self.base)) else ("direction",)
        with bases.without_memories(self.base.state, early):
            state_dict = self.base.state_dict()
        groups = bases.groups_in(state_dict) or []
        state_dict = bases.with_groups(state_dict, [{**group, bases.METHOD: self.recipe.name} for group in groups])
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of its base optimizer alone; the latter leaves the recipe's values.

        A state of another method leaves them too, and the logger ``gam_fast`` says so.

        Raises:
            RuntimeError: during a step.
            ValueError: the groups do not fit, or hold a hyper-parameter out of range; nothing is then changed.
        """
        self._refuse_nesting("load_state_dict()")
        state_dict = copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        names = (*self._own_defaults, *self._kept(), PERTURB, ADAPTIVE)
        own = [{key: group[key] for key in names if key in group} for group in self.param_groups]
        groups, other = bases.merged(bases.groups_in(state_dict) or [], own, self.recipe.name, self._own_defaults)
        for group in groups:
            self._check_hyper(group)
        self._check_difference(groups)
        self.base.load_state_dict(bases.with_groups(state_dict, groups))
        self._progress.mode = ""  # unknown until the loaded state is used
        for group, kept in zip(self.param_groups, own, strict=False):
            group.update({key: value for key, value in kept.items() if key not in group})
        self._complete_groups()
        if other is not None:
            bases.tell_of_another(other, self.recipe.name, self.param_groups, self._own_defaults)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _switch(self, mode: str, *args: Any, **kwargs: Any) -> None:
        """Call ``train()`` or ``eval()`` of a base that has them, such as a schedule-free one.

        Raises:
            RuntimeError: during a step. But ``train()``, which a Trainer calls before each backward, then does nothing
                if it was also the last call before the step.
        """
        if self._progress.current is not None and mode == self._progress.mode == "train":
            return
        self._refuse_nesting(f"{mode}()")
        for base in members(self.base):
            if hasattr(base, mode):
                getattr(base, mode)(*args, **kwargs)
        self._progress.mode = mode

    def _refuse_nesting(self, what: str) -> None:
        if self._progress.step is not None and self._progress.current is not None:
            cure = "run the loop over passes() to its end"
            if what == "step()":
                cure = "the loop over passes() takes the step, so leave step() and scaler.step() out of its body"
            raise RuntimeError(
                f"{what} while a step of this {type(self).__name__} is in progress: {cure}, or "
                "close() the iterator to undo the step"
            )

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_hyper(group)
        check_params(group["params"], perturbed=self.recipe.moves)
        taken = (name for member in members(self.base) for name in member.defaults)
        check_keys(
            type(self).__name__,
            (*self._keys.values(), PERTURB, *((ADAPTIVE,) if self.recipe.adaptive else ())),
            taken,
            group,
        )

    def _check_hyper(self, group: dict[str, Any]) -> None:
        for name, key in self._keys.items():
            if key in group:
                self.recipe.check(name, group[key])
                radius.is_auto(group[key])
        for key in (PERTURB, ADAPTIVE):
            if not isinstance(group.get(key, True), bool):
                raise TypeError(f"{key} of a parameter group must be True or False, got {group[key]!r}")
        if not group.get(ADAPTIVE, True) and self.recipe.adaptive is None:
            raise ValueError(f"a parameter group has {ADAPTIVE}=False, which is for ASAM; {self.recipe.name} has no T")
        for key in (*COUNTS, radius.LENGTH, DRAWS):
            value = group.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{key} of a parameter group must be a number that is not negative, got {value!r}")

    def _check_difference(self, groups: Sequence[dict[str, Any]]) -> None:
        name = self.recipe.difference
        if name is not None:
            key = self._keys[name]
            radius.check_alike(name, [group.get(key, self._own_defaults[key]) for group in groups])

    def _complete_groups(self) -> None:
        self._fill(self._own_defaults)
        first = self.param_groups[0] if self.param_groups else {}
        # _kept() reads the values filled in above
        self._fill({key: first.get(key, number) for key, number in self._kept().items()})

    def _fill(self, values: dict[str, Any]) -> None:
        for group, mine in zip(self.param_groups, filled(self.base), strict=True):
            for key, value in values.items():
                if key not in group:
                    group[key] = value
                    mine.add(key)

    def _kept(self) -> dict[str, float]:
        """Return the initial values of the numbers that every group keeps from step to step."""
        name = self.recipe.difference
        auto = name is not None and any(isinstance(group.get(self._keys[name]), str) for group in self.param_groups)
        return {radius.LENGTH: 0.0} if auto else {}
