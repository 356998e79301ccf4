"""From the final direction to the new parameters: torch's SGD, Adam and AdamW as one primitive, any other as it is.

The state of the base optimizer is laid out by torch's own conventions (``momentum_buffer``; ``step``, ``exp_avg``,
``exp_avg_sq``, ``max_exp_avg_sq``), so that checkpoints go both ways between it and the plain optimizer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .backends.base import AdamGroup, Backend, Direction, Leaves, SGDGroup, TensorList
from .chain import members
from .hooks import step_of_base
from .ownership import as_dtype
from .participants import Shard, materialise
from .sharded import any_sharded, local, local_gradient, spread

Directions: TypeAlias = "list[tuple[Shard, Direction]]"
"""The direction of each shard."""

FusedUpdate: TypeAlias = "Callable[[Optimizer, Backend, TensorList, Leaves, Direction, int], None]"
"""By the base optimizer, the backend, the parameters that the leaves are (or are local parts of), the direction, and
the number of the base optimizer's first group among all groups."""

_SGD_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
_ADAM_NUMBERS = ("lr", "eps", "weight_decay")


def fused_update(base: Optimizer) -> FusedUpdate | None:
    """The update that restores θ and takes the step of ``base`` in one primitive, or ``None`` where torch must do it.

    torch does it for every other optimizer (subclasses too), for hyper-parameters that are tensors, for
    ``differentiable=True``, for Adam with ``capturable`` or ``fused`` (their step counters live on the device), and
    when hooks are registered on ``base`` itself.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> fused_update(torch.optim.SGD([weight], lr=0.1)).__name__
    'sgd_update'
    >>> fused_update(torch.optim.RMSprop([weight])) is None
    True
    """
    if base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks:
        return None
    groups = base.param_groups
    if any(group.get("differentiable") for group in groups):
        return None
    if type(base) is SGD and _all_numbers(groups, _SGD_NUMBERS):
        return sgd_update
    if type(base) in (Adam, AdamW) and _all_numbers(groups, _ADAM_NUMBERS):
        betas = all(not isinstance(beta, Tensor) for group in groups for beta in group["betas"])
        on_host = not any(group.get("capturable") or group.get("fused") for group in groups)
        on_host = on_host and all(
            state["step"].device.type == "cpu" for state in base.state.values() if "step" in state
        )
        return adam_update if betas and on_host else None
    return None


def apply(
    base: Optimizer, directions: Directions, before: Callable[[], None] | None = None, *, copy: bool = True
) -> None:
    """Restore θ and let the base optimizer step along the directions, one a device.

    Args:
        base: the base optimizer, or a chain of them, each of which steps along its part.
        directions: what stands for the gradients.
        before: hooks, which find the direction in ``param.grad`` and leave there what is taken in its place; a
            parameter without a gradient is then left alone.
        copy: whether ``param.grad`` is afterwards as it was, whatever ``before`` does; else it is what that left.
    """
    if before is None:
        _step(base, directions)
        return
    grads = [(param, param.grad) for group in base.param_groups for param in group["params"]]
    done = False
    try:
        for shard, direction in directions:
            made = materialise(shard, direction)
            if copy and made is direction.terms[-1]:  # perhaps the gradients themselves
                made = [x.clone(memory_format=torch.preserve_format) for x in made]
            for param, grad in zip(shard.owners, made, strict=True):
                param.grad = spread(grad, param)
        with torch.enable_grad():
            before()
        left = _left(grads, directions)
        if left is not None:
            _step(base, left)
        else:
            for member in members(base):
                with torch.enable_grad():
                    step_of_base(member)
        done = True
    finally:
        if copy or not done:
            for param, grad in grads:
                param.grad = grad


def _left(grads: Sequence[tuple[Tensor, Tensor | None]], directions: Directions) -> Directions | None:
    """The directions that hooks have left in ``param.grad``; ``None`` where they gave one to another parameter too."""
    found: Directions = []
    count = 0
    for shard, direction in directions:
        chosen = [i for i, param in enumerate(shard.owners) if param.grad is not None]
        if not chosen:
            continue
        count += len(chosen)
        part = _part(shard, chosen)
        part.leaves.backup, part.leaves.saved = [], False  # θ is there, perhaps changed by a hook
        term = [
            as_dtype(local_gradient(p), part.leaves.vectors or x.dtype)
            for p, x in zip(part.owners, part.leaves.params, strict=True)
        ]
        ones = [[1.0] * len(direction.p[0])]
        found.append((part, Direction([shard.backend.bookkeeping.hold(term)], ones)))
    dense = all(param.grad is None or param.grad.layout is torch.strided for param, _ in grads)
    return found if dense and count == sum(param.grad is not None for param, _ in grads) else None


def _part(shard: Shard, chosen: Sequence[int]) -> Shard:
    """Some leaves of a shard as one of their own."""
    leaves, hold = shard.leaves, shard.backend.bookkeeping.hold
    params, backup = list(leaves.params), list(leaves.backup)
    group = [leaves.group[i] for i in chosen]
    part = Leaves(hold([params[i] for i in chosen]), group, saved=leaves.saved, vectors=leaves.vectors)
    if leaves.saved:
        part.backup = hold([backup[i] for i in chosen])
    return Shard(shard.backend, part, [shard.owners[i] for i in chosen], shard.layout)


def _by_member(base: Optimizer, directions: Directions) -> Iterator[tuple[Optimizer, Directions, int]]:
    """Each base optimizer of a chain, its part of the directions, and the number of its first group."""
    first = 0
    for member in members(base):
        if member is base:
            yield base, directions, 0
            return
        groups = range(first, first + len(member.param_groups))
        parts: Directions = []
        for shard, direction in directions:
            chosen = [i for i, group in enumerate(shard.leaves.group) if group in groups]
            if not chosen:
                continue
            terms = [list(term) for term in direction.terms]
            hold = shard.backend.bookkeeping.hold
            picked = replace(direction, terms=[hold([term[i] for i in chosen]) for term in terms])
            parts.append((_part(shard, chosen), picked))
        yield member, parts, first
        first = groups.stop


def _step(base: Optimizer, directions: Directions) -> None:
    """As :func:`apply`, without hooks that look on."""
    for member, parts, first in _by_member(base, directions):
        update = fused_update(member)
        if update is None:
            _step_by_torch(member, parts)
            continue
        for shard, direction in parts:
            update(member, shard.backend, shard.owners, shard.leaves, direction, first)
        member._opt_called = True  # type: ignore[attr-defined]  # for a scheduler constructed on the base


def _step_by_torch(base: Optimizer, directions: Directions) -> None:
    grads = [(param, param.grad) for group in base.param_groups for param in group["params"]]
    try:
        for shard, direction in directions:
            for param, grad in zip(shard.owners, materialise(shard, direction), strict=True):
                param.grad = spread(grad, param)
        with torch.enable_grad():
            step_of_base(base)
    finally:
        for param, grad in grads:
            param.grad = grad


def _among_all(groups: list[Any], first: int, total: int) -> list[Any]:
    """Hyper-parameters of groups ``first`` … of ``total``, at their numbers; what stands at the others is not read."""
    return (
        groups if len(groups) == total else [groups[0]] * first + groups + [groups[0]] * (total - first - len(groups))
    )


def only_makes_state(base: Optimizer) -> bool:
    """Return whether lr and all gradients are 0: so torch.distributed.checkpoint lets an optimizer make its state.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.zeros(2)
    >>> only_makes_state(torch.optim.SGD([weight], lr=0.0)), only_makes_state(torch.optim.SGD([weight], lr=0.1))
    (True, False)
    """
    if any(group.get("lr") != 0.0 for group in base.param_groups):
        return False
    grads = [param.grad for group in base.param_groups for param in group["params"]]
    return not any(grad is None or bool(local(grad).any()) for grad in grads)


def _all_numbers(groups: Sequence[dict[str, Any]], names: tuple[str, ...]) -> bool:
    for group in groups:  # no generator: it takes twice as long, in every step
        for name in names:
            if isinstance(group[name], Tensor):
                return False
    return True


def _states(base: Optimizer, owners: TensorList) -> Sequence[dict[str, Any]]:
    """The state of each; mostly in the order of the dictionary, which is much faster read than looked up in."""
    found = base.state
    if len(found) == len(owners) and all(map(operator.is_, found, owners)):
        return list(found.values())
    return [found.get(param, {}) for param in owners]


def _locals(state: Sequence[Tensor | None]) -> list[Any]:
    """Return the part of each that this process holds."""
    if not any_sharded(state):
        return list(state)
    return [None if value is None else local(value) for value in state]


def sgd_update(
    base: Optimizer, backend: Backend, owners: TensorList, leaves: Leaves, d: Direction, first_group: int = 0
) -> None:
    """Restore, and one step of :class:`torch.optim.SGD` along ``d`` (formula: :meth:`Backend.sgd`)."""
    groups = [
        SGDGroup(
            float(group["lr"]),
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            bool(group["nesterov"]),
            bool(group.get("maximize", False)),
        )
        for group in base.param_groups
    ]
    groups = _among_all(groups, first_group, len(d.p[0]))
    has_momentum = [group.momentum != 0.0 for group in groups]
    buffers: list[Tensor | None] = [None] * len(owners)
    if any(has_momentum):
        buffers = [state.get("momentum_buffer") for state in _states(base, owners)]
    if not all(has_momentum):
        buffers = [x if has_momentum[group] else None for x, group in zip(buffers, leaves.group, strict=True)]
    first = [buffer is None for buffer in buffers]
    made = [i for i, group in enumerate(leaves.group) if first[i] and has_momentum[group]] if any(first) else []
    for i in made:
        buffers[i] = torch.zeros_like(owners[i], memory_format=torch.preserve_format)
    backend.sgd(leaves, d, _locals(buffers), first, groups)
    for i in made:
        base.state[owners[i]]["momentum_buffer"] = buffers[i]


def adam_update(
    base: Optimizer, backend: Backend, owners: TensorList, leaves: Leaves, d: Direction, first_group: int = 0
) -> None:
    """Restore, and one step of :class:`torch.optim.Adam` or AdamW along ``d`` (formula: :meth:`Backend.adam`).

    Raises:
        RuntimeError: while a CUDA graph is captured, which would repeat the bias correction of one step.
    """
    if leaves.params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{type(base).__name__} counts its steps on the host, which a CUDA graph does not repeat: pass "
            "capturable=True to capture it"
        )
    groups = [
        AdamGroup(
            float(group["lr"]),
            float(group["betas"][0]),
            float(group["betas"][1]),
            float(group["eps"]),
            float(group["weight_decay"]),
            isinstance(base, AdamW) or bool(group.get("decoupled_weight_decay", False)),
            bool(group["amsgrad"]),
            bool(group.get("maximize", False)),
        )
        for group in base.param_groups
    ]
    groups = _among_all(groups, first_group, len(d.p[0]))
    states = []
    for param, group, before in zip(owners, leaves.group, _states(base, owners), strict=True):
        state = dict(before)
        if not state:
            step_dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
            state["step"] = torch.zeros((), dtype=step_dtype, device="cpu")  # whatever the default device
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        if groups[group].amsgrad and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        states.append(state)
    # one read for all counters: they are 0-dim tensors, by torch's layout of the state
    steps = (torch.stack([state["step"] for state in states]) + 1.0).tolist()
    backend.adam(
        leaves,
        d,
        _locals([state["exp_avg"] for state in states]),
        _locals([state["exp_avg_sq"] for state in states]),
        _locals([state.get("max_exp_avg_sq") for state in states]),
        steps,
        groups,
    )
    for param, state in zip(owners, states, strict=True):
        base.state[param] = state
    torch._foreach_add_([state["step"] for state in states], 1.0)
