"""From the final direction to the new parameters. SGD, Adam, AdamW and Lion run as one primitive, others as they are.

The state of the base optimizer has torch's layout (``momentum_buffer``; ``step``, ``exp_avg``, ``exp_avg_sq``,
``max_exp_avg_sq``), so checkpoints can be exchanged with the plain optimizer in both directions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .backends.base import Backend, Block, Direction, TensorList
from .backends.eager import EagerBackend
from .bases import Chain, members, without_memories
from .distributed import local, spread
from .hooks import step_of_base
from .ownership import lies_as, may_be_part, parts_of_buffers, take_gradients
from .parameters import ParameterBlock, materialise

Directions: TypeAlias = "list[tuple[ParameterBlock, Direction]]"
"""The direction of each block."""

Group: TypeAlias = "dict[str, Any]"
Numbers: TypeAlias = "tuple[float, ...]"
Options: TypeAlias = "tuple[list[Numbers], list[int]]"


class Fused:
    """A base optimizer whose step is one primitive (:meth:`Backend.update`).

    Attributes:
        formula: its name in the backends.
        state: the names of its state in torch's layout, in the order of the formula.
        counts: whether each parameter's state counts its steps (``step``).
    """

    formula: ClassVar[str]
    state: ClassVar[tuple[str, ...]]
    counts: ClassVar[bool] = False

    def fits(self, base: Any) -> bool:
        """Return whether the formula can take the step of an optimizer with its present groups."""
        raise NotImplementedError

    def numbers(self, base: Any, group: Group) -> Numbers:
        """Return the numbers of a parameter group, in the order of the formula."""
        raise NotImplementedError

    def keeps(self, group: Group) -> tuple[bool, ...]:
        """Return for each state whether a group has it."""
        return (True,) * len(self.state)

    def options(self, groups: list[Group], of_leaf: list[int], new: list[bool], steps: list[float]) -> Options:
        """Return the distinct numbers of the leaves, and for each leaf its index in them.

        The arguments have, for each leaf, its group, whether it has no state yet, and its step number if counted.
        """
        return [()], [0] * len(of_leaf)

    def advance(self, base: Any) -> None:
        """Count the step of all parameters."""


_OF_SGD = ("lr", "momentum", "dampening", "weight_decay")


class FusedSGD(Fused):
    """The step of :class:`torch.optim.SGD`."""

    formula = "sgd"
    state = ("momentum_buffer",)

    def fits(self, base: Any) -> bool:
        """Accept torch's SGD with plain numbers as hyper-parameters."""
        return type(base) is SGD and _all_numbers(base.param_groups, _OF_SGD)

    def numbers(self, base: Any, group: Group) -> Numbers:
        """Return lr, momentum, dampening, weight decay, nesterov and maximize."""
        flags = float(group["nesterov"]), float(group.get("maximize", False))
        return (*map(float, map(group.__getitem__, _OF_SGD)), *flags)

    def keeps(self, group: Group) -> tuple[bool, ...]:
        """Return whether the group uses momentum."""
        return (group["momentum"] != 0.0,)

    def options(self, groups: list[Group], of_leaf: list[int], new: list[bool], steps: list[float]) -> Options:
        """Return 1 for a leaf whose momentum starts in this step, 0 for others."""
        return [(0.0,), (1.0,)], list(map(int, new))


class FusedAdam(Fused):
    """The step of :class:`torch.optim.Adam` and :class:`torch.optim.AdamW`."""

    formula = "adam"
    state = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    counts = True

    def fits(self, base: Any) -> bool:
        """Accept torch's Adam and AdamW with plain numbers as hyper-parameters and step counters on the host."""
        groups = base.param_groups
        if type(base) not in (Adam, AdamW) or not _all_numbers(groups, ("lr", "eps", "weight_decay")):
            return False
        if any(isinstance(beta, Tensor) for group in groups for beta in group["betas"]):
            return False
        # capturable and fused optimizers keep their step counters on the device
        on_host = not any(group.get("capturable") or group.get("fused") for group in groups)
        return on_host and all(state["step"].is_cpu for state in base.state.values() if "step" in state)

    def numbers(self, base: Any, group: Group) -> Numbers:
        """Return β₁, β₂, ε, weight decay (coupled, and as a factor) and maximize."""
        decoupled = isinstance(base, AdamW) or bool(group.get("decoupled_weight_decay", False))
        decay = _decay(float(group["weight_decay"]), float(group["lr"]), decoupled)
        beta1, beta2 = group["betas"]
        return float(beta1), float(beta2), float(group["eps"]), *decay, float(group.get("maximize", False))

    def keeps(self, group: Group) -> tuple[bool, ...]:
        """Return True for both moments, and whether the group uses the maximum of the second."""
        return True, True, bool(group["amsgrad"])

    def options(self, groups: list[Group], of_leaf: list[int], new: list[bool], steps: list[float]) -> Options:
        """Return the bias-corrected step size and root correction of each leaf's group and step number."""
        keys = list(zip(of_leaf, steps, strict=True))
        # few, because most parameters of a group have the same step number
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        option = list(map(places.__getitem__, keys))
        found: list[Numbers] = []
        for g, t in places:
            beta1, beta2 = groups[g]["betas"]
            found.append((float(groups[g]["lr"]) / (1.0 - beta1**t), math.sqrt(1.0 - beta2**t)))
        return found, option


class FusedLion(Fused):
    """The step of any Lion with the arguments of ``pytorch_optimizer.Lion``, without its extras."""

    formula = "lion"
    state = ("exp_avg",)

    def fits(self, base: Any) -> bool:
        """Accept a Lion without gradient centralisation and other extras."""
        groups = base.param_groups
        return (
            type(base).__name__ == "Lion"
            and hasattr(base, "maximize")
            and all({"betas", "weight_decouple", "fixed_decay"} <= group.keys() for group in groups)
            and not any(group.get(extra) for group in groups for extra in ("use_gc", "adanorm", "cautious"))
            and _all_numbers(groups, ("lr", "weight_decay"))
        )

    def numbers(self, base: Any, group: Group) -> Numbers:
        """Return lr, β₁, β₂, weight decay (coupled, and as a factor) and maximize."""
        rate = 1.0 if group["fixed_decay"] else float(group["lr"])
        decay = _decay(float(group["weight_decay"]), rate, bool(group["weight_decouple"]))
        beta1, beta2 = group["betas"]
        return float(group["lr"]), float(beta1), float(beta2), *decay, float(base.maximize)

    def advance(self, base: Any) -> None:
        """Count the step in each group, as Lion itself does."""
        for group in base.param_groups:
            group["step"] = group.get("step", 0) + 1


FUSED = FusedSGD(), FusedAdam(), FusedLion()
"""The base optimizers whose step is one primitive."""


def _decay(decay: float, rate: float, decoupled: bool) -> tuple[float, float]:
    """Return λ of coupled weight decay, and the factor of decoupled decay."""
    return (0.0, 1.0 - rate * decay) if decoupled else (decay, 1.0)


def _all_numbers(groups: list[Group], names: tuple[str, ...]) -> bool:
    for group in groups:  # a generator would take twice as long, in every step
        for name in names:
            if isinstance(group[name], Tensor):
                return False
    return True


def fused(base: Optimizer) -> Fused | None:
    """Return the primitive that takes the step of ``base`` and restores θ; ``None`` if torch takes the step.

    torch takes the step of all other optimizers (subclasses too), and also with hyper-parameters that are tensors, with
    ``differentiable=True``, of Adam with ``capturable`` or ``fused``, and if hooks are registered on ``base``.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> fused(torch.optim.SGD([weight], lr=0.1)).formula
    'sgd'
    >>> fused(torch.optim.RMSprop([weight])) is None
    True
    """
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return None
    for group in base.param_groups:  # generators would take twice as long, in every step
        if group.get("differentiable"):
            return None
    for row in FUSED:
        if row.fits(base):
            return row
    return None


def apply(
    base: Optimizer,
    directions: Directions,
    before: Callable[[], None] | None = None,
    confirm: Callable[[], None] | None = None,
    *,
    copy: bool = True,
) -> Sequence[Tensor]:
    """Restore θ and let the base optimizer step along the directions, one per block.

    Args:
        base: the base optimizer, or a chain of them, each of which steps along its part.
        directions: the directions, which stand for the gradients.
        before: pre-hooks. They find the direction in ``param.grad``, and the step uses what they leave there. A
            parameter that they leave without a gradient is not updated.
        confirm: called before the first write, once what can be prepared is; it may raise.
        copy: whether to restore ``param.grad`` after ``before``; otherwise it stays as the hooks leave it.

    Returns:
        The parameters that have a direction and were not updated.
    """
    if before is None:
        _step(base, directions, confirm)
        return ()
    if confirm is not None:
        confirm()
    grads = [(param, param.grad) for group in base.param_groups for param in group["params"]]
    done = False
    try:
        for block, direction in directions:
            made = materialise(block, direction)
            if copy and made is direction.terms[-1]:  # may be the gradients themselves
                made = [x.clone(memory_format=torch.preserve_format) for x in made]
            _set_gradients(block, made)
        with torch.enable_grad():
            before()
        left = _left(grads, directions)
        if left is not None:
            _step(base, left)
        else:
            for member in members(base):
                with without_memories(member.state), torch.enable_grad():
                    step_of_base(member)
        done = True
        return [owner for block, _ in directions for owner in block.owners if owner.grad is None]
    finally:
        if copy or not done:
            for param, grad in grads:
                param.grad = grad
        else:
            _put_into_buffers(grads)


def _put_into_buffers(grads: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Copy what hooks have left to the gradients from before, where these are parts of other code's buffers."""
    views = [(param, grad) for param, grad in grads if grad is not None and may_be_part(grad)]
    are_parts = parts_of_buffers([grad for _, grad in views])
    for (param, grad), is_part in zip(views, are_parts, strict=True):
        left = param.grad
        if is_part and left is not None and left is not grad and left.layout is torch.strided:
            param.grad = grad.copy_(left)


def _set_gradients(block: ParameterBlock, grads: TensorList) -> None:
    for param, grad in zip(block.owners, grads, strict=True):
        param.grad = spread(grad, param)


def _left(grads: Sequence[tuple[Tensor, Tensor | None]], directions: Directions) -> Directions | None:
    """Return the directions that hooks left in ``param.grad``; ``None`` if another parameter got one too."""
    found: Directions = []
    count = 0
    for block, direction in directions:
        chosen = [i for i, param in enumerate(block.owners) if param.grad is not None]
        if not chosen:
            continue
        count += len(chosen)
        part = block.part(chosen, saved=False)  # θ is restored, perhaps changed by a hook
        term = take_gradients(part.owners, False, part.vectors)
        ones = [[1.0] * len(direction.p[0])]
        found.append((part, Direction([block.backend.bookkeeping.hold(term)], ones)))
    dense = all(param.grad is None or param.grad.layout is torch.strided for param, _ in grads)
    return found if dense and count == sum(param.grad is not None for param, _ in grads) else None


def _step(
    base: Optimizer, directions: Directions, confirm: Callable[[], None] | None = None, first_group: int = 0
) -> None:
    """Do the work of :func:`apply` without pre-hooks: each base optimizer of a chain steps along its part."""
    if isinstance(base, Chain):
        for member in base.members:
            groups = range(first_group, first_group + len(member.param_groups))
            parts: Directions = []
            for block, direction in directions:
                chosen = [i for i, group in enumerate(block.group) if group in groups]
                if chosen:
                    terms = [block.pick(term, chosen) for term in direction.terms]
                    parts.append((block.part(chosen, saved=block.saved), replace(direction, terms=terms)))
            _step(member, parts, confirm, first_group)
            first_group = groups.stop
        return
    row = fused(base)
    if confirm is not None and (row is None or not directions):  # a fused step confirms by itself
        confirm()
    if row is None:
        _step_by_torch(base, directions)
        return
    for block, direction in directions:
        fused_step(base, row, block, direction, confirm, first_group)
    row.advance(base)
    base._opt_called = True  # type: ignore[attr-defined]  # for a scheduler constructed on the base


def _step_by_torch(base: Optimizer, directions: Directions) -> None:
    grads = [(param, param.grad) for group in base.param_groups for param in group["params"]]
    try:
        for block, direction in directions:
            _set_gradients(block, materialise(block, direction))
        with without_memories(base.state), torch.enable_grad():
            step_of_base(base)
    finally:
        for param, grad in grads:
            param.grad = grad


def only_makes_state(base: Optimizer) -> bool:
    """Return whether lr and all gradients are 0, as in the step by which DCP lets an optimizer make its state.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.zeros(2)
    >>> only_makes_state(torch.optim.SGD([weight], lr=0.0)), only_makes_state(torch.optim.SGD([weight], lr=0.1))
    (True, False)
    """
    if any(group.get("lr") != 0.0 for group in base.param_groups):
        return False
    grads = [param.grad for group in base.param_groups for param in group["params"]]
    return not any(grad is None or bool(local(grad).any()) for grad in grads)


def fused_step(
    base: Optimizer,
    row: Fused,
    block: ParameterBlock,
    d: Direction,
    confirm: Callable[[], None] | None = None,
    first_group: int = 0,
) -> None:
    """Restore θ, and take one step of ``base`` along ``d``, unless ``confirm`` raises.

    Raises:
        RuntimeError: a CUDA graph is being captured; it would repeat the bias correction of one step.
    """
    owners, count = block.owners, len(block.owners)
    if row.counts and block.params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{type(base).__name__} counts its steps on the host, which a CUDA graph does not repeat: pass "
            "capturable=True to capture it"
        )
    groups = base.param_groups
    after = len(d.p[0]) - len(groups) - first_group
    if first_group or after:  # a member of a chain: pad to the chain's group numbers; the padding is not read
        groups = [groups[0]] * first_group + groups + [groups[0]] * after
    keeps = list(map(row.keeps, groups))
    states: Sequence[dict[str, Any]] = [{}] * count
    if any(map(any, keeps)):
        found = base.state
        # mostly in the dictionary's order, and iterating is much faster than looking up
        is_in_order = len(found) == count and all(map(operator.is_, found, owners))
        states = list(found.values()) if is_in_order else [found.get(param, {}) for param in owners]
    made: dict[int, dict[str, Tensor]] = {}  # by leaf; put into the state after the step
    steps: list[Tensor] = []
    if row.counts:
        for i, state in enumerate(states):
            if "step" not in state:
                dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
                made[i] = {"step": torch.zeros((), dtype=dtype, device="cpu")}  # whatever the default device
            steps.append(made[i]["step"] if i in made else state["step"])
    new = [True] * count
    lists: list[list[Any]] = []
    for name, has in zip(row.state, zip(*keeps, strict=True), strict=True):
        values: list[Any] = [None] * count
        if any(has):
            values = list(map(operator.methodcaller("get", name), states))
            if not all(has):
                values = [value if has[g] else None for value, g in zip(values, block.group, strict=True)]
            absent = list(map(operator.is_, values, [None] * count))
            new = new if lists else absent
            if any(absent):
                for i, g in enumerate(block.group):
                    if absent[i] and has[g]:
                        values[i] = torch.zeros_like(owners[i], memory_format=torch.preserve_format)
                        made.setdefault(i, {})[name] = values[i]
        lists.append(values)
    counted = block.backend.bookkeeping.count_steps(steps, False) if steps else []
    options, option = row.options(groups, block.group, new, counted)
    numbers = [row.numbers(base, group) for group in groups]
    backend, target, d, lists = _fitting(block, d, lists, made, row.state)
    if confirm is not None:
        confirm()
    backend.update(target, d, row.formula, lists, numbers, options, option)
    for i, state in made.items():
        base.state[owners[i]].update(state)
    if steps:
        block.backend.bookkeeping.count_steps(steps, True)


def _fitting(
    block: ParameterBlock,
    d: Direction,
    lists: list[list[Any]],
    made: dict[int, dict[str, Tensor]],
    names: Sequence[str],
) -> tuple[Backend, Block, Direction, list[list[Any]]]:
    """Return the state as the backend takes it: in the parameters' memory order, and converted by torch if needed.

    The dtype differs if the model was converted after a step of its optimizer, or if a state from before that was
    loaded.
    """
    takes_state = block.backend.takes_state
    if block.layout is not None:
        lists = [[None if value is None else local(value) for value in values] for values in lists]
    if takes_state(block, lists):
        return block.backend, block, d, lists
    if block.layout is None:
        for name, values in zip(names, lists, strict=True):
            for i, (value, param) in enumerate(zip(values, block.params, strict=True)):
                if value is not None and value.dtype is param.dtype and not lies_as(value, param):
                    values[i] = torch.empty_like(param).copy_(value)
                    made.setdefault(i, {})[name] = values[i]
        if takes_state(block, lists):
            return block.backend, block, d, lists
    plain = Block(list(block.params), block.group, list(block.backup), block.saved)
    return EagerBackend(), plain, replace(d, terms=[list(term) for term in d.terms]), lists
