"""The keyword arguments of every method: their documentation, types and checks, and the per-step options.

Each option of :class:`gam_fast.optimizer.SharpnessAwareOptimizer` has its text in :data:`OPTIONS` and its type in
:class:`Options`; a test compares both with the constructor.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn, optim
from torch.nn.parameter import is_lazy
from typing_extensions import TypedDict  # a dependency of torch

from .active import Rules, StepSchedule
from .buffers import ForwardState
from .capture import refuse_to_look
from .radius import Difference
from .recipe import Recipe
from .rng import ReplayRNG
from .turn import frames_of_libraries

OPTIONS = """\
model: the module being trained, or ``ModuleList([...])`` of several: also a loss or a teacher, if the body runs it and
    it has buffers that move. If given, everything that its forward writes into it moves once per step: buffers of
    any name (running statistics, ``_u`` of spectral norm, observers, codebooks, queues) and parameters that are not
    trained (momentum encoders). All passes see the values at the start, and an undone step leaves no trace. Parameters
    of the model that are not in ``params`` get the gradient of the first pass, not the sum over all passes.
backend: ``"auto"``, or one of :func:`gam_fast.backends.available`.
replay_rng: draw the same random numbers (dropout, Mixup) in each pass: from torch's default generators, from Python's
    and NumPy's global ones, and, given a list such as ``[generator]``, from those too. Read the batch before the
    passes, or by :meth:`~gam_fast.SharpnessAwareOptimizer.micro_batches`: extra draws in the first pass alone would
    shift its masks.
freeze_running_statistics: whether ``model`` has the effect above. The first step copies buffers and parameters to find
    out which of them move; later steps copy those and watch the rest (:mod:`gam_fast.buffers`).
moving_buffers: patterns (see :mod:`fnmatch`) for names of buffers of ``model`` that may move in every pass, such as
    ``["*.calls"]``.
ascent_share: s, above 0 and at most 1: all passes but the last see the leading share s of the batch. The body selects
    it by ``xb, yb = turn.rows(x, y)`` or :meth:`~gam_fast.SharpnessAwareOptimizer.micro_batches`. A step of GAM then
    costs 3 s + 1 gradients. Running statistics and the state of generators are those of the last pass; the loss is that
    of the first.
interval: take the whole recipe at every ``interval``-th step, and a step of the base optimizer alone otherwise;
    ``math.inf``: never take the whole recipe.
active: further restricts the steps that take the whole recipe: a rule of :mod:`gam_fast.active`, a function of the
    step number, or a list of these, which must all agree.
norm: the norm that the radius of a perturbation refers to: ``"global"``, over all perturbed parameters, or
    ``"group"``: each parameter group has its own norm, and is perturbed by the whole radius. For one norm per layer,
    make one group per layer (:func:`gam_fast.subsets.layers`). Not for ASAM, which has a radius per element.
clip_grad_norm: if given, the final direction is scaled down to at most this norm over all groups.
sync: for data parallelism. ``"global"``: each pass averages its gradient, as DistributedDataParallel does, and all
    processes go to the same points. ``"local"``: each process perturbs along its own gradients (m-sharpness), and
    only the final direction is averaged; pass the DistributedDataParallel as ``model``. The processes agree on the
    parameters that take part, and on whether to take the step.
on_nonfinite: ``"raise"`` raises :class:`~gam_fast.NonFiniteGradientError`, ``"skip"`` counts the step in
    :attr:`~gam_fast.SharpnessAwareOptimizer.skipped_steps`; both undo it. ``"ignore"`` does not check, like torch's
    optimizers. On an accelerator the check costs one wait for the device at the end of a step, and a norm of the last
    gradient.
"""

ARGUMENTS = """\
params: as for any torch optimizer: parameters, named parameters, or one dict per parameter group, which may set any
    hyper-parameter of the recipe or of the base for its group. ``None`` with an instance.
base_optimizer: a torch optimizer class (or any callable with its signature), an instance over ``params``, or a list
    of instances over disjoint parameters (:mod:`gam_fast.bases`). Keys that an earlier optimizer around the same
    instance has put into its groups are removed; keys that you have set stay.
"""

BASE_ARGUMENTS = """\
lr, momentum, betas, weight_decay, …: the arguments of ``base_optimizer``, if it is a class.
"""


class BaseArguments(TypedDict, total=False):
    """Keyword arguments of torch's optimizers. Bind any others by ``functools.partial``, or pass an instance."""

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
    """Keyword arguments of every method, besides its own hyper-parameters."""

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
    """Options of a method without a hyper-parameter α: ``alpha`` is RMSprop's."""

    alpha: float


class OptionsOfBase(OptionsWithAlpha, total=False):
    """Options of :class:`gam_fast.methods.Base`: ``rho`` is Adadelta's."""

    rho: float


@dataclass(slots=True)  # not frozen: that would cost microseconds in every step
class Settings:
    """Per-step options."""

    recipe: Recipe
    model: nn.Module | None = None
    replay_rng: ReplayRNG | None = None
    freeze_running_statistics: bool = True
    moving_buffers: Sequence[str] = ()
    forward_state: ForwardState = field(default_factory=ForwardState)
    norm: str = "global"
    clip_grad_norm: float | None = None
    on_nonfinite: str = "raise"
    sync: str = "global"
    ascent_share: float = 1.0
    schedule: StepSchedule | None = None
    """Decides by ‖g0‖² whether the step goes on to other points; ``None`` if no rule looks at it."""
    others: Sequence[Tensor] = ()
    """Parameters of ``model`` that belong to another optimizer."""
    difference: Difference | None = None
    """The automatic radius of the step."""
    skips_empty: bool = False
    """Skip a step whose first pass has no gradient, because a framework leaves backward out."""

    def check_capture(self, devices: Iterable[torch.device]) -> None:
        """Raise RuntimeError if a CUDA graph is being captured that could not repeat the step."""
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
    """Insert the texts of the shared arguments into the docstring.

    They replace the lines ``params: as everywhere.`` and ``options: those of every method.``
    """
    lines = []
    for line in (method.__doc__ or "").splitlines():  # None under python -OO
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
    """Return the names of all options."""
    return tuple(re.findall(r"^(\w+):", OPTIONS, flags=re.MULTILINE))


def check_arguments(
    method: str, own: Sequence[str], params: Any, base_optimizer: Any, arguments: dict[str, Any]
) -> None:
    """Refuse wrong arguments before the base optimizer raises an error in its own name.

    Args:
        method: the name of the method.
        own: the names of its hyper-parameters.
        params: as given to the constructor.
        base_optimizer: as given to the constructor.
        arguments: the keyword arguments that are left for the base optimizer.

    Raises:
        TypeError: parameters or a base optimizer of the wrong kind; a keyword that neither method nor base takes.
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
            continue  # the base may take it
        hint = f"{_HINTS[name]}. " if name in _HINTS else f"did you mean {near[0]}? " if near else ""
        base = getattr(base_optimizer, "__name__", "its base optimizer")
        raise TypeError(
            f"{method} got an unexpected keyword argument {name!r} ({value!r}): {hint}{method} takes "
            f"{', '.join((*own, *names()))}, and {base} {', '.join(known) or 'what its own constructor takes'}"
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def checked(recipe: Recipe, **given: Any) -> dict[str, Any]:
    """Return the options that a step goes by, as :class:`Settings` takes them. Refuse wrong ones."""
    check_choice("sync", given["sync"], ("global", "local"))
    check_choice("on_nonfinite", given["on_nonfinite"], ("raise", "skip", "ignore"))
    check_norm(given["norm"], recipe)
    check_clip(given["clip_grad_norm"])
    check_share(given["ascent_share"])
    return {
        **given,
        "replay_rng": ReplayRNG.wanted(given["replay_rng"]),
        "freeze_running_statistics": bool(given["freeze_running_statistics"]),
        "moving_buffers": patterns(given["moving_buffers"]),
        "ascent_share": float(given["ascent_share"]),
    }


def check_norm(norm: str, recipe: Recipe) -> None:
    """Refuse a norm that there is not, or not for this recipe."""
    check_choice("norm", norm, ("global", "group"))
    if norm == "group" and recipe.adaptive is not None:
        raise ValueError(f"norm='group' is not for {recipe.name}, which has a radius per element: leave it out")


def check_clip(limit: float | None) -> None:
    """Refuse a limit that is neither ``None`` nor a positive number."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float | Tensor)):
        raise TypeError(f"clip_grad_norm must be a number or None, got {limit!r}")
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"clip_grad_norm must be a positive number or None, got {limit!r}")


def check_share(share: object) -> None:
    """Refuse a share outside of 0 < share ≤ 1."""
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"ascent_share must be a number, got {share!r}")
    if not 0.0 < share <= 1.0:
        raise ValueError(f"ascent_share must be above 0 and at most 1, got {share!r}")


def patterns(names: Sequence[str]) -> tuple[str, ...]:
    """Return the patterns of ``moving_buffers``; refuse anything but a list of strings."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"moving_buffers must be a list of patterns of names, got {names!r}")
    return tuple(names)


def check_params(params: Any, *, perturbed: bool = True) -> None:
    """Refuse parameters that no step can handle; torch checks the rest.

    Warn of memory that is shared with other processes if steps perturb the parameters.

    Raises:
        TypeError: a complex parameter.
        ValueError: a parameter that is listed twice, or is on the meta device.
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
        if perturbed and shape is not None and type(param.data) is Tensor and param.is_cpu and param.is_shared():
            warnings.warn(
                "the parameters are in memory that other processes may share (model.share_memory(), or a model that "
                "was sent to this process): they would see them perturbed, and restoring them undoes updates of other "
                "processes. Train a copy (copy.deepcopy(model)) in each process, or use DistributedDataParallel",
                stacklevel=frames_of_libraries(),
            )
            perturbed = False


def check_keys(method: str, own: Sequence[str], known: Iterable[str], group: Mapping[str, Any]) -> None:
    """Refuse a key of a parameter group that looks like a misspelt hyper-parameter of the method.

    Raises:
        ValueError: the key is nearly one of ``own``, and not in ``known``.
    """
    others = group.keys() - {"params", "param_names", *own, *known, *BaseArguments.__annotations__}
    for key in sorted(others):
        near = difflib.get_close_matches(key.lower(), own, n=1, cutoff=0.8)
        if near:
            raise ValueError(
                f"a parameter group of {method} has {key!r} ({group[key]!r}), which no code reads: did you mean "
                f"{near[0]}?"
            )


def no_attribute(method: str, name: str) -> str:
    """Return the message for a missing attribute."""
    hint = _METHODS.get(name)
    return f"{method!r} object has no attribute {name!r}" + (f": {hint}" if hint else "")


def _parameters(function: Any) -> list[inspect.Parameter]:
    if callable(function):
        with contextlib.suppress(TypeError, ValueError):  # a builtin has no signature
            return list(inspect.signature(function).parameters.values())
    return [inspect.Parameter("arguments", inspect.Parameter.VAR_KEYWORD)]  # unknown
