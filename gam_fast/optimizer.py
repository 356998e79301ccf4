"""The engine: a torch optimizer that takes every step by a recipe around a base optimizer.

Its steps are in :mod:`gam_fast.stepping`; here is what lasts: parameter groups, state, options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import bases, radius
from .active import COUNTS, Rules, StepSchedule
from .backends import Backend, select
from .bases import Given, build_base, filled, is_instance, left_behind, members
from .buffers import ForwardState
from .distributed import SYNC, check_supported
from .models import ModelOfCopy, Surroundings
from .options import check_arguments, check_keys, check_params, documented, no_attribute
from .recipes import BASE, Recipe, fold_plan
from .rng import ReplayRNG
from .stepping import Progress, Stepper

_ON_NONFINITE = ("raise", "skip", "ignore")


@documented
class SharpnessAwareOptimizer(Stepper):
    """A torch optimizer that hands its base optimizer the direction of a :class:`~gam_fast.recipes.Recipe`.

    The classes of :mod:`gam_fast.methods` (GAM, SAM, …) are this class with a recipe each.

    A step is either ``optimizer.step(closure)``, the closure being called once a pass, or the loop
    ``for turn in optimizer.passes(): loss_fn(model(x), y).backward()``. Gradients are the optimizer's during a step: it
    clears them before each pass, and afterwards ``param.grad`` is the gradient of the last pass. Those that are parts
    of a buffer which somebody else holds are zeroed and stay where they are; with a gradient scaler the last pass's are
    unscaled in place, as by ``scaler.unscale_``. Several backward calls in one pass add up. A step that does not come
    to its end (an exception, a ``break``, a KeyboardInterrupt, a gradient that is not finite) leaves parameters,
    running statistics and random state as they were, bit for bit.

    Args:
        params: as everywhere.
        options: those of every method.
        hyper: the recipe's hyper-parameters and, where ``base_optimizer`` is a class, its arguments. Where the base
            has one of the same name (``alpha`` of RMSprop), the keyword is the recipe's, its key in ``param_groups``
            gets the recipe's name in front (``gam_alpha``), and the base's own is given through an instance.

    Raises:
        TypeError: complex parameters; a base that needs a closure (LBFGS) or sparse gradients (SparseAdam).
        ValueError: a hyper-parameter out of range, an instance over other parameters, an unknown option, a recipe that
            would need more than three buffers.
        RuntimeError: a backend that is not available.
    """

    recipe: ClassVar[Recipe] = BASE
    _copied: ModelOfCopy | None
    train: Callable[..., Any]  # these two only where the base has them, see __getattr__
    eval: Callable[..., Any]

    def __init__(
        self,
        params: Iterable[Any] | None,
        base_optimizer: Given = torch.optim.SGD,
        *,
        model: nn.Module | None = None,
        backend: str = "auto",
        replay_rng: bool | Iterable[Any] = True,
        freeze_running_statistics: bool = True,
        moving_buffers: Sequence[str] = (),
        clip_grad_norm: float | None = None,
        on_nonfinite: str = "raise",
        sync: str = "global",
        ascent_share: float = 1.0,
        interval: float = 1,
        active: Rules = None,
        **hyper: Any,
    ) -> None:
        if sync not in SYNC:
            raise ValueError(f"sync must be one of {', '.join(SYNC)}, got {sync!r}")
        if on_nonfinite not in _ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {', '.join(_ON_NONFINITE)}, got {on_nonfinite!r}")
        _check_clip(clip_grad_norm)
        _check_share(ascent_share)
        self._schedule = StepSchedule(interval, active)
        fold_plan(self.recipe)  # refuses a table that needs more than three buffers
        given = vars(self).pop("_given")
        own = {name: hyper.pop(name, default) for name, default in self.recipe.defaults.items()}
        for name, value in own.items():
            self.recipe.check(name, value)
            radius.is_auto(value)
        check_arguments(type(self).__name__, tuple(own), params, base_optimizer, hyper)
        self.base = build_base(params, base_optimizer, hyper)
        prefix = self.recipe.name.lower()
        taken = {name for member in members(self.base) for name in member.defaults}
        self._keys = {name: f"{prefix}_{name}" if name in taken else name for name in own}
        self._own_defaults = {self._keys[name]: value for name, value in own.items()}
        chosen = {name for name, value in own.items() if name in given or value != self.recipe.defaults[name]}
        explicit = {self._keys[name]: own[name] for name in chosen}
        stale = left_behind(self.base, explicit if is_instance(base_optimizer) else {})
        groups = [
            {key: value for key, value in group.items() if key not in keys}
            for group, keys in zip(self.base.param_groups, stale, strict=True)
        ]
        for group in groups:
            self._check_group(group)
        self._backend_name = backend
        self._backends: dict[torch.device, Backend] = {}
        self._progress = Progress()
        self.model = model
        self._options: dict[str, Any] = {
            "sync": sync,
            "replay_rng": ReplayRNG.wanted(replay_rng),
            "freeze_running_statistics": bool(freeze_running_statistics),
            "moving_buffers": _patterns(moving_buffers),
            "clip_grad_norm": clip_grad_norm,
            "on_nonfinite": on_nonfinite,
            "ascent_share": float(ascent_share),
        }
        for param in self._parameters():
            self._select(param.device)
        self._surroundings = Surroundings()
        self._check_difference(groups)
        for group, keys, mine in zip(self.base.param_groups, stale, filled(self.base), strict=True):
            for key in keys:
                group.pop(key, None)
            mine.clear()
        self._complete_groups()
        # torch's constructor would make groups and state of its own. Ours are those of the base optimizer (see the
        # properties below), so only its hooks and its profiling are set up, as it does itself when it unpickles.
        super().__setstate__({"defaults": {**self.base.defaults, **self._own_defaults}})

    if not TYPE_CHECKING:  # for which every argument would do, and every name would be an attribute

        def __new__(cls, *args: Any, **options: Any) -> SharpnessAwareOptimizer:
            self = super().__new__(cls)
            self._given = set(options)  # also what is given as it is by default
            return self

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):
                return object.__getattribute__(self, name)  # a property that failed: by its own error
            if name in ("train", "eval") and any(hasattr(base, name) for base in members(self.__dict__.get("base"))):
                return partial(self._switch, name)
            raise AttributeError(no_attribute(type(self).__name__, name), name=name, obj=self)

    def _switch(self, mode: str, *args: Any, **kwargs: Any) -> None:
        """``train()`` or ``eval()`` of a base that has them, such as a schedule-free one.

        Raises:
            RuntimeError: during a step; but ``train()``, which a Trainer calls before each backward, does nothing there
                if it was called before the step.
        """
        if self._current is not None and mode == self._progress.mode == "train":
            return
        self._refuse_nesting(f"{mode}()")
        for base in members(self.base):
            if hasattr(base, mode):
                getattr(base, mode)(*args, **kwargs)
        self._progress.mode = mode

    # What is shared with the base optimizer, for good: also after load_state_dict has replaced it.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, those of the base optimizer."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The state by parameter, that of the base optimizer."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def model(self) -> nn.Module | None:
        """The module being trained; set it where a wrapper is put around it later (by ``Accelerator.prepare``).

        Copies and pickles of the optimizer do not contain it: they take the module that holds their parameters.

        Raises:
            TypeError: no module; a module of FSDP1 or DeepSpeed, which are not supported.
        """
        if self._copied is not None:
            found = self._copied.find(self._parameters())
            if found is not None or not self._copied.matters:
                self.model = found
        return self._model

    @model.setter
    def model(self, model: nn.Module | None) -> None:
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or None, got {model!r}")
        check_supported(model, list(self._parameters()))
        self._model, self._copied = model, None
        self._progress.forward_state = ForwardState()

    @property
    def clip_grad_norm(self) -> float | None:
        """The norm that the final direction is scaled down to, or ``None``; may be set between steps."""
        limit: float | None = self._options["clip_grad_norm"]
        return limit

    @clip_grad_norm.setter
    def clip_grad_norm(self, limit: float | None) -> None:
        self._refuse_nesting("setting clip_grad_norm")
        _check_clip(limit)
        self._options["clip_grad_norm"] = limit

    @property
    def ascent_share(self) -> float:
        """The share of the batch that all passes but the last see; may be set between steps."""
        share: float = self._options["ascent_share"]
        return share

    @ascent_share.setter
    def ascent_share(self, share: float) -> None:
        self._refuse_nesting("setting ascent_share")
        _check_share(share)
        self._options["ascent_share"] = float(share)

    @property
    def interval(self) -> float:
        """Every how many steps the whole recipe is taken; may be set between steps, which then count anew."""
        return self._schedule.interval

    @interval.setter
    def interval(self, interval: float) -> None:
        self._refuse_nesting("setting interval")
        self._schedule.change(interval, self._schedule.active)
        self._complete_groups()

    @property
    def active(self) -> Rules:
        """The rules for which steps take the whole recipe; may be set between steps."""
        return self._schedule.active

    @active.setter
    def active(self, active: Rules) -> None:
        self._refuse_nesting("setting active")
        self._schedule.change(self._schedule.interval, active)
        self._complete_groups()

    @property
    def decides_in_first_pass(self) -> bool:
        """Whether a rule looks at the first gradient: what :attr:`Turn.last` says in the first pass is not final."""
        return self._schedule.trigger is not None

    def key(self, name: str) -> str:
        """The key in ``param_groups`` of the recipe's ``name``: itself, unless the base has one so named."""
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
        """The state of the base optimizer; its groups hold the recipe's hyper-parameters and name (``flat_method``).

        Raises:
            RuntimeError: in a pass after the first, where the weights that a checkpoint would go with are perturbed.
        """
        if self._current is not None and self._current.perturbed:
            raise RuntimeError(
                f"state_dict() in a pass of {type(self).__name__} whose weights are perturbed (and the model's "
                "state_dict() holds those): save both behind the loop over passes() or the closure"
            )
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base.state_dict()
        groups = bases.groups_in(state_dict) or []
        state_dict = bases.with_groups(state_dict, [{**group, bases.METHOD: self.recipe.name} for group in groups])
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of its base optimizer alone: then the recipe's values stay as they are.

        They also stay, and the logger ``gam_fast`` says so, where the state is of another method.

        Raises:
            RuntimeError: during a step.
            ValueError: the groups do not fit, or hold a hyper-parameter out of range; nothing is then changed.
        """
        self._refuse_nesting("load_state_dict()")
        state_dict = copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        names = (*self._own_defaults, *self._kept())
        own = [{key: group[key] for key in names if key in group} for group in self.param_groups]
        groups, other = bases.merged(bases.groups_in(state_dict) or [], own, self.recipe.name, self._own_defaults)
        for group in groups:
            self._check_hyper(group)
        self._check_difference(groups)
        self.base.load_state_dict(bases.with_groups(state_dict, groups))
        self._progress.mode = ""  # as the state says
        for group, kept in zip(self.param_groups, own, strict=False):
            group.update({key: value for key, value in kept.items() if key not in group})
        self._complete_groups()
        if other is not None:
            bases.tell_of_another(other, self.recipe.name, self.param_groups, self._own_defaults)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_nesting("pickling or copying")
        names = (
            "recipe",
            "base",
            "defaults",
            "_keys",
            "_own_defaults",
            "_backend_name",
            "_options",
            "_schedule",
        )
        found = {name: self.__dict__[name] for name in names if name in self.__dict__}
        model = self._copied or ModelOfCopy.of(self._model, matters=self._options["sync"] != "global")
        return {**found, "skipped_steps": self.skipped_steps, "filled": filled(self.base), "_copied": model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._backends = {}
        self._schedule = StepSchedule()
        self._surroundings = Surroundings()
        self._progress = Progress(state.get("skipped_steps", 0))
        self._model, self._copied = None, None  # a pickle of 0.7.0 or before has a model
        super().__setstate__({name: value for name, value in state.items() if name not in ("skipped_steps", "filled")})
        for keys, known in zip(filled(self.base), state.get("filled", []), strict=False) if "base" in state else ():
            keys |= known
        if hasattr(self, "_options"):
            self._options.setdefault("ascent_share", 1.0)  # of a pickle from before there was one
            if isinstance(self._options["replay_rng"], bool):  # of 0.7.0 and before
                self._options["replay_rng"] = ReplayRNG.wanted(self._options["replay_rng"])

    def __repr__(self) -> str:
        backends = sorted({self._select(param.device).name for param in self._parameters()})
        bases = " + ".join(type(member).__name__ for member in members(self.base))
        head = f"{type(self).__name__} (base: {bases}, backend: {', '.join(backends)}"
        return head + super().__repr__().removeprefix(f"{type(self).__name__} (")

    def _check_can_step(self) -> None:
        if self._progress.mode == "eval":
            raise RuntimeError("a step after optimizer.eval(): call optimizer.train() before training goes on")
        if self._copied is not None and self.model is None and self._copied is not None:
            raise RuntimeError(
                f"this {type(self).__name__} is a copy without its model (a {self._copied.name}, whose buffers are "
                "to move once a step), and no module holds its parameters: set optimizer.model to the module that is "
                "trained, or to None"
            )

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _select(self, device: torch.device) -> Backend:
        if device not in self._backends:
            self._backends[device] = select(self._backend_name, device)
        return self._backends[device]

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_hyper(group)
        check_params(group["params"])
        taken = (name for member in members(self.base) for name in member.defaults)
        check_keys(type(self).__name__, tuple(self._keys.values()), taken, group)

    def _check_hyper(self, group: dict[str, Any]) -> None:
        for name, key in self._keys.items():
            if key in group:
                self.recipe.check(name, group[key])
                radius.is_auto(group[key])
        for key in (*COUNTS, radius.LENGTH):
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
        self._fill({key: first.get(key, number) for key, number in self._kept().items()})  # it depends on those values

    def _fill(self, values: dict[str, Any]) -> None:
        for group, mine in zip(self.param_groups, filled(self.base), strict=True):
            for key, value in values.items():
                if key not in group:
                    group[key] = value
                    mine.add(key)

    def _kept(self) -> dict[str, float]:
        """Return what is kept in every group from step to step, as it is before the first."""
        name = self.recipe.difference
        auto = name is not None and any(isinstance(group.get(self._keys[name]), str) for group in self.param_groups)
        return {**self._schedule.fields, **({radius.LENGTH: 0.0} if auto else {})}


def _check_clip(limit: float | None) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float | Tensor)):
        raise TypeError(f"clip_grad_norm must be a number or None, got {limit!r}")
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"clip_grad_norm must be a positive number or None, got {limit!r}")


def _patterns(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"moving_buffers must be a list of patterns of names, got {names!r}")
    return tuple(names)


def _check_share(share: object) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"ascent_share must be a number, got {share!r}")
    if not 0.0 < share <= 1.0:
        raise ValueError(f"ascent_share must be above 0 and at most 1, got {share!r}")
