"""The keyword arguments of every method: their documentation, types and checks, and what a step is told of them.

An option of :class:`gam_fast.optimizer.SharpnessAwareOptimizer` has its text in :data:`OPTIONS`, its type in
:class:`Options`; a test compares both with the constructor.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn, optim
from torch.nn.parameter import is_lazy
from typing_extensions import TypedDict  # which torch needs itself

from .active import Rules, StepSchedule
from .buffers import ForwardState
from .capture import refuse_to_look
from .radius import Difference
from .recipe import Recipe
from .rng import ReplayRNG

OPTIONS = """\
model: the module being trained. Given, what its forward writes into it moves once a step: buffers of any name
    (running statistics, ``_u`` of spectral norm, observers, codebooks, queues) and parameters that are not being
    trained (momentum encoders). All passes see them as they were, and a step that is undone leaves no trace.
    Its parameters that are not in ``params`` get the gradient of the first pass, not the sum over all passes.
backend: ``"auto"``, or one of :func:`gam_fast.backends.available`.
replay_rng: draw the same random numbers (dropout, Mixup) in each pass: from torch's default generators, Python's
    and NumPy's global ones, and, with a list such as ``[generator]``, from the user's. Read the batch before the
    passes, or by :meth:`micro_batches`: other draws of the first pass alone shift its masks.
freeze_running_statistics: switch for what ``model`` does. The first step copies buffers and parameters to find out
    which of them move; later steps copy those and watch the rest (:mod:`gam_fast.buffers`).
moving_buffers: patterns (as of :mod:`fnmatch`) of the names of buffers of ``model`` that may move in every
    pass, such as ``["*.calls"]``.
ascent_share: s, above 0 and at most 1: all passes but the last see the leading share s of the batch, which the body
    takes by ``xb, yb = turn.rows(x, y)`` or :meth:`micro_batches`. A step of GAM then costs 3 s + 1 gradients.
    Running statistics and the state of generators are those of the last pass, the loss is that of the first.
interval: the whole recipe at every ``interval``-th step, the base optimizer alone between; ``math.inf``: never.
active: which steps take the whole recipe besides: a rule of :mod:`gam_fast.active`, a function of the number of
    the step, or a list of these, which must all agree.
norm: the norm that the radius of a perturbation refers to: ``"global"``, over all that is perturbed, or ``"group"``:
    each parameter group has its own, and its perturbation the whole radius. For one norm per layer, make a group of
    each layer (:func:`gam_fast.subsets.layers`). Not for ASAM, which has a radius per element.
clip_grad_norm: if given, the final direction is scaled down to at most this norm over all groups.
sync: in data parallelism, ``"global"``: each pass averages its gradient, as DistributedDataParallel does, and all
    processes go to the same points. ``"local"``: each walks along its own gradients (m-sharpness), and only the
    final direction is averaged; pass the DistributedDataParallel as ``model``. The processes agree on which
    parameters take part, and on whether the step is taken.
on_nonfinite: ``"raise"`` :class:`~gam_fast.NonFiniteGradientError`, or ``"skip"`` the step and count it in
    :attr:`skipped_steps`; both undo it. ``"ignore"`` does not look, as torch's optimizers do not. Looking
    costs an accelerator one wait for the device at the end of a step, and a norm of the last gradient.
"""

ARGUMENTS = """\
params: as for any torch optimizer: parameters, named parameters, or dicts, one a parameter group, in which any
    hyper-parameter of the recipe or of the base may be set for the group. ``None`` with an instance.
base_optimizer: a torch optimizer class (or any callable with its signature), an instance over ``params``, or a list
    of instances over disjoint parameters (:mod:`gam_fast.bases`). What an earlier optimizer around the same instance
    has put into its groups goes; what you have set there yourself stays.
"""

BASE_ARGUMENTS = """\
lr, momentum, betas, weight_decay, …: the arguments of ``base_optimizer``, where that is a class.
"""


class BaseArguments(TypedDict, total=False):
    """Keyword arguments of torch's optimizers; others are given by ``functools.partial`` or an instance."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float | Tensor
    nesterov: bool
    betas: tuple[float | Tensor, float | Tensor]
    eps: float | tuple[float | None, float]
    amsgrad: bool
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
    centered: bool
    decoupled_weight_decay: bool
    momentum_decay: float
    lr_decay: float
    initial_accumulator_value: float
    lambd: float
    t0: float
    etas: tuple[float, float]
    step_sizes: tuple[float, float]
    beta2_decay: float
    d: float
    ns_coefficients: tuple[float, float, float]
    ns_steps: int
    adjust_lr_fn: str | None
    optimizer_class: type[optim.Optimizer]
    process_group: Any
    parameters_as_bucket_view: bool


class Options(BaseArguments, total=False):
    """Keyword arguments of every method beside its own hyper-parameters."""

    model: nn.Module | None
    backend: str
    replay_rng: bool | Iterable[Any]
    freeze_running_statistics: bool
    moving_buffers: Sequence[str]
    norm: str
    clip_grad_norm: float | None
    on_nonfinite: str
    sync: str
    ascent_share: float
    interval: float
    active: Rules


class OptionsWithAlpha(Options, total=False):
    """For a method without an α of its own, so that it is that of RMSprop."""

    alpha: float


class OptionsOfBase(OptionsWithAlpha, total=False):
    """For :class:`gam_fast.methods.Base`, so that ρ is that of Adadelta."""

    rho: float


@dataclass(slots=True)  # not frozen, which would cost microseconds in every step
class Settings:
    """The options of an optimizer that a step goes by."""

    recipe: Recipe
    model: nn.Module | None = None
    replay_rng: ReplayRNG | None = None
    freeze_running_statistics: bool = True
    moving_buffers: Sequence[str] = ()
    forward_state: ForwardState | None = None
    norm: str = "global"
    clip_grad_norm: float | None = None
    on_nonfinite: str = "raise"
    sync: str = "global"
    ascent_share: float = 1.0
    schedule: StepSchedule | None = None
    """Tells by ‖g0‖² if the step goes on to other points; ``None`` where that is not asked."""
    others: Sequence[Tensor] = ()
    """Parameters of ``model`` that belong to another optimizer."""
    difference: Difference | None = None
    """The automatic radius of the step."""

    def check_capture(self, devices: Iterable[torch.device]) -> None:
        """Raises RuntimeError where a CUDA graph is being captured that could not repeat the step."""
        looking = [f"on_nonfinite={self.on_nonfinite!r}"] if self.on_nonfinite != "ignore" else []
        if self.schedule is not None:
            looking.append("a rule such as WhenSteep")
        refuse_to_look(looking, devices)


_HINTS = {
    "adaptive": "the adaptive form of SAM is gam_fast.ASAM (for adaptive=False, leave it out)",
    "base": "the base optimizer is the second argument, base_optimizer=",
    "optimizer": "the base optimizer is the second argument, base_optimizer=",
    "clip_norm": "to clip, write clip_grad_norm=",
    "max_norm": "to clip, write clip_grad_norm=",
    "max_grad_norm": "to clip, write clip_grad_norm=",
    "grad_clip": "to clip, write clip_grad_norm=",
    "grad_rho": "it is rho_prime= here",
    "grad_norm_rho": "it is rho= here",
    "grad_beta_0": "it is beta=(1.0, 1 - grad_beta_0) here",
    "grad_beta_1": "it is alpha= here",
    "grad_gamma": "it is gamma= here",
}
_LOOP = "for turn in optimizer.passes(): criterion(model(x), y).backward()"
_METHODS = {
    **dict.fromkeys(("first_step", "second_step", "ascent_step", "descent_step"), f"one loop is the step: {_LOOP}"),
    "set_closure": f"write optimizer.step(closure), or {_LOOP}",
}

T = TypeVar("T", bound=type)


def documented(method: T) -> T:
    """Put the texts of all options into the docstring, in place of a line ``options: those of every method.``"""
    lines = []
    for line in (method.__doc__ or "").splitlines():  # there is none under python -OO
        indent = line[: len(line) - len(line.lstrip())]
        if line.strip() == "params: as everywhere.":
            lines += [indent + text for text in ARGUMENTS.splitlines()]
        elif line.strip() == "options: those of every method.":
            lines += [indent + text for text in (OPTIONS + BASE_ARGUMENTS).splitlines()]
        else:
            lines.append(line)
    if lines:
        method.__doc__ = "\n".join(lines)
    return method


def names() -> tuple[str, ...]:
    """The names of all options."""
    return tuple(re.findall(r"^(\w+):", OPTIONS, flags=re.MULTILINE))


def check_arguments(
    method: str, own: Sequence[str], params: Any, base_optimizer: Any, arguments: dict[str, Any]
) -> None:
    """Refuse what cannot be right, before the base optimizer complains about it in its own name.

    Args:
        method: the name of the method.
        own: the names of its hyper-parameters.
        params, base_optimizer: as given to the constructor.
        arguments: the keyword arguments that are left for the base optimizer.

    Raises:
        TypeError: parameters or a base optimizer of the wrong kind; a keyword that neither takes.
    """
    if isinstance(params, optim.Optimizer):
        raise TypeError(
            f"params of {method} is an optimizer ({type(params).__name__}): write {method}(None, optimizer) to wrap it"
        )
    if isinstance(params, nn.Module):
        raise TypeError(
            f"params of {method} is a module ({type(params).__name__}): write {method}(model.parameters(), …, "
            "model=model)"
        )
    if inspect.isroutine(params):
        raise TypeError(f"params of {method} is a function: call it, as in {method}(model.parameters(), …)")
    if isinstance(params, type) and issubclass(params, optim.Optimizer):
        raise TypeError(
            f"params of {method} is a class, {params.__name__}: the parameters come first, the class second"
        )
    if isinstance(base_optimizer, nn.Module):
        raise TypeError(f"base_optimizer of {method} is a module ({type(base_optimizer).__name__}): write model=")
    if isinstance(base_optimizer, str | float):
        word = str(base_optimizer).lower()
        mend = next((f"torch.optim.{name}" for name in dir(optim) if name.lower() == word), "torch.optim.SGD")
        mend = f"write {mend}" if isinstance(base_optimizer, str) else f"a learning rate is lr={base_optimizer!r}"
        raise TypeError(f"base_optimizer must be a torch optimizer class or instance, got {base_optimizer!r}: {mend}")
    parameters = _parameters(base_optimizer)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)][1:]
    for name, value in arguments.items():
        if name in known or (takes_any and name in BaseArguments.__annotations__):
            continue
        near = difflib.get_close_matches(name.lower(), [*own, *names(), *known], n=1, cutoff=0.75)
        if takes_any and name not in _HINTS and not (near and near[0] not in known):
            continue  # it may be for the base
        hint = f"{_HINTS[name]}. " if name in _HINTS else f"did you mean {near[0]}? " if near else ""
        base = getattr(base_optimizer, "__name__", "its base optimizer")
        raise TypeError(
            f"{method} got an unexpected keyword argument {name!r} ({value!r}): {hint}{method} takes "
            f"{', '.join((*own, *names()))}, and {base} {', '.join(known) or 'what its own constructor takes'}"
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse an option that is none of its choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_norm(norm: str, recipe: Recipe) -> None:
    """Refuse a norm that there is not, or not for this recipe."""
    check_choice("norm", norm, ("global", "group"))
    if norm == "group" and recipe.adaptive is not None:
        raise ValueError(f"norm='group' is not for {recipe.name}, which has a radius per element: leave it out")


def check_clip(limit: float | None) -> None:
    """Refuse a limit of the norm that is no positive number."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float | Tensor)):
        raise TypeError(f"clip_grad_norm must be a number or None, got {limit!r}")
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"clip_grad_norm must be a positive number or None, got {limit!r}")


def check_share(share: object) -> None:
    """Refuse a share that is not above 0 and at most 1."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"ascent_share must be a number, got {share!r}")
    if not 0.0 < share <= 1.0:
        raise ValueError(f"ascent_share must be above 0 and at most 1, got {share!r}")


def patterns(names: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of ``moving_buffers``; refuse what is no list of strings."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"moving_buffers must be a list of patterns of names, got {names!r}")
    return tuple(names)


def check_params(params: Any) -> None:
    """Refuse parameters of a group that no step can be right for; what else there is, torch checks.

    Raises:
        TypeError: a complex one.
        ValueError: one that is listed twice, or on the meta device.
    """
    seen = set()
    for entry in [params] if isinstance(params, Tensor) else params:
        param = entry[1] if isinstance(entry, tuple) else entry
        if not isinstance(param, Tensor):
            continue
        shape = None if is_lazy(param) else tuple(param.shape)
        if id(param) in seen:
            raise ValueError(
                f"a parameter of shape {shape} is listed twice in a parameter group: list each once "
                "(list(dict.fromkeys(params)) leaves the others out)"
            )
        seen.add(id(param))
        if param.is_meta:
            raise ValueError(
                f"a parameter of shape {shape} is on the meta device, without values: materialise the model "
                "(model.to_empty(device=…), then initialise or load it), and construct the optimizer after that"
            )
        if param.is_complex():
            raise TypeError(
                f"a parameter of shape {shape} is complex ({param.dtype}): optimize a real parameter and use "
                "torch.view_as_complex of it in the model"
            )


def check_keys(method: str, own: Sequence[str], known: Iterable[str], group: Mapping[str, Any]) -> None:
    """Refuse a key of a parameter group that looks like a misspelt hyper-parameter of the method.

    Raises:
        ValueError: it is nearly one of ``own``, and none of ``known``.
    """
    others = group.keys() - {"params", "param_names", *own, *known, *BaseArguments.__annotations__}
    for key in sorted(others):
        near = difflib.get_close_matches(key.lower(), own, n=1, cutoff=0.8)
        if near:
            raise ValueError(
                f"a parameter group of {method} has {key!r} ({group[key]!r}), which nobody reads: did you mean "
                f"{near[0]}?"
            )


def no_attribute(method: str, name: str) -> str:
    """The message for an attribute that is not there."""
    hint = _METHODS.get(name)
    return f"{method!r} object has no attribute {name!r}" + (f": {hint}" if hint else "")


def _parameters(function: Any) -> list[inspect.Parameter]:
    if callable(function):
        with contextlib.suppress(TypeError, ValueError):  # of a builtin
            return list(inspect.signature(function).parameters.values())
    return [inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)]  # not ours to say
