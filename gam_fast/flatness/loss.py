"""What is measured: a loss as a function of the parameters, with its gradient and Hessian-vector products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import hvp, rng
from ..batchnorm import running_statistics
from .vectors import Vector, norm, scaled, wide

MODES = ("eval", "frozen")
Params: TypeAlias = "Iterable[Any] | Mapping[str, Iterable[Tensor]] | None"
Terms: TypeAlias = "Callable[[], Iterator[tuple[Callable[[], Tensor], float]]]"
"""For each batch its loss, not yet computed, and what it is multiplied by before the sum."""


class Loss:
    r"""The mean loss over a whole data set, :math:`L(θ) = \sum_b n_b L_b(θ) / \sum_b n_b`, read batch by batch.

    The measures of :mod:`gam_fast.flatness` take it as their first argument. They leave parameters, gradients, running
    statistics, modes of modules and random state as they were, bit for bit, whatever happens.

    Args:
        model: called with the inputs of a batch: ``model(x)``; ``model(*x)`` for a tuple or list, ``model(**x)`` for a
            mapping. Batches are moved to its device.
        loss_fn: ``loss_fn(output, target)``, a tensor of one element. Its attribute ``reduction`` is heeded, as torch's
            losses have it.
        data: an iterable of pairs ``(x, target)`` that can be read again and again: a list, a ``DataLoader``. Each
            reading starts from the same random state, so that a shuffling loader gives the same batches.
        params: what L is a function of: parameters (default: those of ``model`` that require a gradient), named
            parameters, the ``param_groups`` of an optimizer, or a mapping of names to parameters. The latter two make
            groups, which :meth:`by_group` measures one by one.
        mode: of the modules: ``"eval"``, or ``"frozen"``: as they are, so that in train mode BatchNorm normalises by
            the batch and dropout draws the same masks each time, but running statistics do not move.
        reduction: ``"mean"`` or ``"sum"`` over the examples of a batch; ``None``: that of ``loss_fn``, or ``"mean"``.
        count: :math:`n_b` of a batch; ``None``: the length of its target.
        seed: of the random state in which each reading of the data starts.

    Raises:
        TypeError: data that can be read once only; complex parameters.
        ValueError: an unknown mode or reduction, no parameters, a parameter twice.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(model.weight, 2.0)
    >>> data = [(torch.ones(3, 1), torch.zeros(3, 1)), (torch.zeros(1, 1), torch.zeros(1, 1))]
    >>> loss = Loss(model, nn.MSELoss(), data)       # ¾ w²
    >>> loss.value()
    3.0
    >>> loss.gradient()
    (3.0, [tensor([[3.]])])
    >>> loss.product([torch.ones(1, 1)])
    [tensor([[1.5000]])]
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Iterable[tuple[Any, Any]],
        *,
        params: Params = None,
        mode: str = "eval",
        reduction: str | None = None,
        count: Callable[[Any], float] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {model!r}; for a closure: Loss.from_closure")
        if isinstance(data, Iterator):
            raise TypeError(
                f"data can be read once only ({type(data).__name__}), but is needed again: give a list or a DataLoader"
            )
        reduction = reduction or getattr(loss_fn, "reduction", "mean")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}: the loss of a batch is one number")

        def terms() -> Iterator[tuple[Callable[[], Tensor], float]]:
            for batch in data:
                x, target = self._pair(batch)
                n = count(batch) if count is not None else _length(target, x)
                yield partial(_loss_of, model, loss_fn, x, target), n

        params = (p for p in model.parameters() if p.requires_grad) if params is None else params
        self._build(terms, params, model, mode, seed, mean=reduction == "mean")
        try:
            self._one_batch = len(data) == 1  # type: ignore[arg-type]
        except TypeError:
            self._one_batch = False

    @classmethod
    def from_closure(
        cls,
        closure: Callable[[], Tensor],
        params: Iterable[Any] | Mapping[str, Iterable[Tensor]],
        *,
        model: nn.Module | None = None,
        mode: str = "frozen",
        seed: int = 0,
    ) -> Loss:
        """A loss computed by ``closure``, which does not call backward.

        It is called anew for each evaluation, in the same random state. With ``model``, ``mode`` is that of its
        modules, and its running statistics do not move.

        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> Loss.from_closure(lambda: weight.square().sum(), [weight]).value()
        25.0
        """
        self = cls.__new__(cls)
        self._build(lambda: iter([(closure, 1.0)]), params, model, mode, seed, mean=True)
        self._one_batch = True
        return self

    def _build(self, terms: Terms, params: Any, model: nn.Module | None, mode: str, seed: int, mean: bool) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        self.groups = _grouped(params)
        self.params = [param for group in self.groups.values() for param in group]
        if not self.params:
            raise ValueError("there are no parameters that require a gradient: nothing to measure")
        if len({id(param) for param in self.params}) < len(self.params):
            raise ValueError("a parameter is listed twice in params: give each once, in one group")
        for param in self.params:
            if not isinstance(param, Tensor):
                raise TypeError(f"params must be tensors, got {param!r}")
            if not param.requires_grad or not param.is_floating_point():
                raise TypeError(
                    "params must be real and require a gradient, got one of shape "
                    f"{tuple(param.shape)} with dtype {param.dtype} and requires_grad={param.requires_grad}"
                )
        self.model = model
        self.mode = mode
        self.seed = seed
        self._terms = terms
        self._mean = mean
        self._open = False
        kinds = {param.device for param in self.params if param.device.type not in ("cpu", "meta")}
        self._devices = [torch.device("cpu"), *sorted(kinds, key=str)]

    @property
    def size(self) -> int:
        """How many numbers the parameters are."""
        return sum(param.numel() for param in self.params)

    def by_group(self) -> dict[str, Loss]:
        """The same loss as a function of one group at a time, the other parameters being constant.

        >>> model = nn.Linear(2, 1)
        >>> loss = Loss(model, nn.MSELoss(), [], params={"weight": [model.weight], "bias": [model.bias]})
        >>> {name: part.size for name, part in loss.by_group().items()}
        {'weight': 2, 'bias': 1}
        """
        parts = {}
        for name, group in self.groups.items():
            part = Loss.__new__(Loss)
            part.__dict__.update(self.__dict__)
            part.groups, part.params = {name: group}, group
            parts[name] = part
        return parts

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Vector]:
        """While it is open parameters may be moved; gives θ. At the end everything is as before, bit for bit."""
        if self._open:
            raise RuntimeError("a measurement of this loss is under way already")
        self._open = True
        theta = [param.detach().clone(memory_format=torch.preserve_format) for param in self.params]
        modules = [] if self.model is None else list(self.model.modules())
        training = [module.training for module in modules]
        buffers = [] if self.model is None else running_statistics(self.model)
        statistics = [buffer.clone() for buffer in buffers]
        grads = [(param, param.grad) for param in self.params]
        states = [(device, rng.get_state(device)) for device in self._devices]
        try:
            with torch.enable_grad():
                if self.model is not None and self.mode == "eval":
                    self.model.eval()
                yield theta
        finally:
            with torch.no_grad():
                for module, flag in zip(modules, training, strict=True):
                    module.training = flag
                for target, saved in zip([*self.params, *buffers], [*theta, *statistics], strict=True):
                    target.copy_(saved)
            for param, grad in grads:
                param.grad = grad
            for device, state in states:
                rng.set_state(device, state)
            self._open = False

    @torch.no_grad()
    def move(self, theta: Vector, delta: Vector | None) -> None:
        """Put the parameters to ``theta + delta``; inside :meth:`measuring`."""
        for i, (param, start) in enumerate(zip(self.params, theta, strict=True)):
            param.copy_(start if delta is None else start + delta[i])

    def value(self) -> float:
        """L.

        Raises:
            ValueError: there is no batch.
            TypeError: a loss that is not a tensor of one element.
        """
        with self._within(), torch.no_grad():
            total, weight = 0.0, 0.0
            for term, n in self._read():
                total += self._factor(n) * float(_checked(term()))
                weight += n
            return total / self._positive(weight)

    def gradient(self) -> tuple[float, Vector]:
        """L and its gradient, as lists of tensors like the parameters. Errors: as :meth:`value`."""
        with self._within():
            total, weight = 0.0, 0.0
            sums = self._zeros()
            for term, n in self._read():
                loss = _checked(term())
                grads = hvp.gradient([loss], self.params, twice=False)
                self._add(sums, grads, self._factor(n))
                total += self._factor(n) * float(loss.detach())
                weight += n
            return total / self._positive(weight), scaled(sums, 1.0 / weight)

    def product(self, vector: Sequence[Tensor]) -> Vector:
        """H v, the Hessian of L times a vector.

        Raises:
            SecondDerivativeError: the loss cannot be differentiated twice; besides as :meth:`value`.
        """
        with self._within():
            weight = 0.0
            sums = self._zeros()
            v = [x.to(param.device, param.dtype) for x, param in zip(vector, self.params, strict=True)]
            for term, n in self._read():
                grads = hvp.gradient([_checked(term())], self.params, twice=True)
                self._add(sums, hvp.product(grads, self.params, v), self._factor(n))
                weight += n
            self._positive(weight)
            return scaled(sums, 1.0 / weight)

    def norm_gradient(self) -> tuple[float, Vector]:
        """‖∇L‖ and its gradient H ∇L/‖∇L‖ (0 where ∇L is 0). Reads the data twice if there is more than one batch.

        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> Loss.from_closure(lambda: weight.square().sum() / 2, [weight]).norm_gradient()
        (5.0, [tensor([0.6000, 0.8000])])
        """
        with self._within():
            if not self._one_batch:
                _, grads = self.gradient()
                length = norm(grads)
                return length, self.product(scaled(grads, 1.0 / length)) if length else self._zeros()
            for term, n in self._read():
                factor = self._factor(n) / self._positive(n)
                found = hvp.gradient([_checked(term())], self.params, twice=True)
                plain = self._zeros()
                self._add(plain, [None if grad is None else grad.detach() for grad in found], factor)
                length = norm(plain)
                sums = self._zeros()
                if length:
                    pairs = zip(scaled(plain, 1.0 / length), self.params, strict=True)
                    unit = [x.to(param.dtype) for x, param in pairs]
                    self._add(sums, hvp.product(found, self.params, unit), factor)
                return length, sums
            self._positive(0.0)
            raise AssertionError

    def _within(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._open else self.measuring()

    def seed_generators(self, seed: int) -> None:
        """Seed torch's generators of the devices in use; inside :meth:`measuring`, which puts them back at its end."""
        for device in self._devices:
            rng.seed(device, seed)

    def _read(self) -> Iterator[tuple[Callable[[], Tensor], float]]:
        """One reading of the data, from the same random state each time; afterwards the state is as before."""
        states = [rng.get_state(device) for device in self._devices]
        try:
            self.seed_generators(self.seed)
            yield from self._terms()
        finally:
            for device, state in zip(self._devices, states, strict=True):
                rng.set_state(device, state)

    def _factor(self, n: float) -> float:
        return n if self._mean else 1.0

    def _zeros(self) -> Vector:
        return [torch.zeros_like(param, dtype=wide(param.dtype)) for param in self.params]

    @staticmethod
    @torch.no_grad()
    def _add(sums: Vector, terms: Sequence[Tensor | None], factor: float) -> None:
        for total, term in zip(sums, terms, strict=True):
            if term is not None:
                total.add_(term.to(total.dtype), alpha=factor)

    @staticmethod
    def _positive(weight: float) -> float:
        if not weight > 0:
            raise ValueError("data gave no batch with an example in it")
        return weight

    def _pair(self, batch: Any) -> tuple[Any, Any]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"a batch must be a pair (inputs, target), got {type(batch).__name__}: make data give pairs, or use "
                "Loss.from_closure"
            )
        device = self.params[0].device
        return _to(batch[0], device), _to(batch[1], device)


def _grouped(params: Any) -> dict[str, list[Tensor]]:
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, got one tensor: write [tensor]")
    if isinstance(params, Mapping):
        return {str(name): list(group) for name, group in params.items()}
    entries = list(params)
    if entries and all(isinstance(entry, Mapping) for entry in entries):
        return {str(entry.get("name", i)): list(entry["params"]) for i, entry in enumerate(entries)}
    return {"all": [entry[1] if isinstance(entry, tuple) else entry for entry in entries]}


def _loss_of(model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], x: Any, target: Any) -> Tensor:
    if isinstance(x, Mapping):
        return loss_fn(model(**x), target)
    return loss_fn(model(*x) if isinstance(x, tuple | list) else model(x), target)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([_to(entry, device) for entry in value]) if type(value) in (tuple, list) else value
    return value


def _length(*values: Any) -> float:
    """The length of the first tensor in ``values`` that has one."""
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return float(len(value))
        if isinstance(value, Mapping):
            value = list(value.values())
        if isinstance(value, tuple | list) and value:
            return _length(*value)
    raise ValueError("the number of examples in a batch cannot be told from its tensors: give count=")


def _checked(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise TypeError(f"the loss of a batch must be a tensor of one element, got {given}")
    return loss
