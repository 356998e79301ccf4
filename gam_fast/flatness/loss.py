"""The measured loss as a function of the parameters, with its gradient and Hessian-vector products."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import hvp, rng
from . import vectors
from .batches import (
    buffers_of,
    checked,
    count_of,
    differentiable,
    generators_of,
    grouped,
    loss_of,
    put_back,
    to_device,
)
from .vectors import Vector, norm, scaled, wide

MODES = ("eval", "frozen")
Params: TypeAlias = "Iterable[Any] | Mapping[str, Iterable[Tensor]] | None"
Terms: TypeAlias = "Callable[[], Iterator[tuple[Callable[[], Tensor], float]]]"
"""For each batch, a function that computes its loss, and the loss's weight in the sum."""


class Loss:
    r"""The mean loss over a whole data set, :math:`L(θ) = \sum_b n_b L_b(θ) / \sum_b n_b`, read batch by batch.

    The measures of :mod:`gam_fast.flatness` take it as their first argument. They always leave parameters, gradients,
    running statistics, modes of modules and random state as they were, bit for bit, also after an error.

    Args:
        model: called with the inputs of a batch: ``model(x)``; ``model(*x)`` for a tuple or list, ``model(**x)`` for a
            mapping. Batches are moved to its device.
        loss_fn: ``loss_fn(output, target)``, a tensor of one element. Its attribute ``reduction`` counts, as in torch's
            losses.
        data: an iterable of pairs ``(x, target)`` that can be read again and again: a list, a ``DataLoader``. Each
            reading starts from the same random state, so that a shuffling loader gives the same batches.
        params: the variables of L: parameters (default: those of ``model`` that require a gradient), named
            parameters, the ``param_groups`` of an optimizer, or a mapping of names to parameters. The latter two define
            groups, which :meth:`by_group` measures one by one.
        mode: the mode of the modules. ``"eval"``; or ``"frozen"``: the mode they are in. In train mode BatchNorm then
            normalises by the batch and dropout draws the same masks each time, but running statistics do not move.
        reduction: ``"mean"`` or ``"sum"`` over the examples of a batch; ``None``: that of ``loss_fn``, or ``"mean"``.
        count: a function of the batch that returns :math:`n_b`. ``None``: the length of the target; for
            ``CrossEntropyLoss`` and ``NLLLoss``, the number they divide by: the targets that are not ``ignore_index``,
            each with its class's ``weight``. Give it for any other loss that divides by a number other than that of the
            examples.
        seed: seed of the random state in which each reading of the data starts.

    Raises:
        TypeError: data that can only be read once; complex parameters.
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
        if reduction is None:
            given = loss_fn.keywords.get("reduction") if isinstance(loss_fn, partial) else None
            reduction = given or getattr(loss_fn, "reduction", "mean")
        if reduction not in ("mean", "batchmean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}: the loss of a batch is one number")

        def terms() -> Iterator[tuple[Callable[[], Tensor], float]]:
            for batch in data:
                x, target = self._pair(batch)
                n = count(batch) if count is not None else count_of(loss_fn, target, x)
                yield partial(loss_of, model, loss_fn, x, target), n

        params = (p for p in model.parameters() if p.requires_grad) if params is None else params
        self._build(terms, params, model, mode, seed, mean=reduction != "sum")
        self._generators: list[torch.Generator] = generators_of(data)
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
        """Make a loss from ``closure``, which computes it and does not call backward.

        Each evaluation calls it once, in the same random state. With ``model``, ``mode`` is the mode of its
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
        self.groups = grouped(params)
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
        self._known_steady = False
        self._generators = []
        self.resolution = max(torch.finfo(wide(param.dtype)).eps for param in self.params)
        kinds = {param.device for param in self.params if param.device.type not in ("cpu", "meta")}
        self._devices = [torch.device("cpu"), *sorted(kinds, key=str)]

    @property
    def size(self) -> int:
        """The number of elements of all parameters."""
        return sum(param.numel() for param in self.params)

    def by_group(self) -> dict[str, Loss]:
        """Return the loss as a function of one group at a time, with the other parameters constant.

        >>> model = nn.Linear(2, 1)
        >>> loss = Loss(model, nn.MSELoss(), [], params={"weight": [model.weight], "bias": [model.bias]})
        >>> {name: part.size for name, part in loss.by_group().items()}
        {'weight': 2, 'bias': 1}
        """
        parts = {}
        for name, group in self.groups.items():
            part = Loss.__new__(Loss)
            part.__dict__.update(self.__dict__)
            part.groups, part.params, part._open = {name: group}, group, False
            parts[name] = part
        return parts

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Vector]:
        """Yield θ; within the block parameters may be moved. At the end everything is restored, bit for bit."""
        if self._open:
            raise RuntimeError("a measurement of this loss is already in progress")
        theta = [param.detach().clone(memory_format=torch.preserve_format) for param in self.params]
        modules = [] if self.model is None else list(self.model.modules())
        training = [module.training for module in modules]
        buffers = buffers_of(self.model)
        grads = [(param, param.grad) for param in self.params]
        self._open = True
        try:
            with torch.inference_mode(False), torch.enable_grad(), rng.kept(self._devices):
                if self.model is not None and self.mode == "eval":
                    self.model.eval()
                yield theta
        finally:
            self._open = False
            with torch.no_grad():
                for target, saved in zip(self.params, theta, strict=True):
                    target.copy_(saved)
            put_back(buffers)
            for module, flag in zip(modules, training, strict=True):
                module.training = flag
            for param, grad in grads:
                param.grad = grad

    @torch.no_grad()
    def move(self, theta: Vector, delta: Vector | None) -> None:
        """Set the parameters to ``theta + delta``; only inside :meth:`measuring`."""
        for i, (param, start) in enumerate(zip(self.params, theta, strict=True)):
            param.copy_(start if delta is None else start + delta[i])

    def value(self) -> float:
        """Return L(θ).

        Raises:
            ValueError: there is no batch.
            TypeError: a loss that is not a tensor of one element.
        """
        with (
            self._within()
        ):  # gradients stay enabled: a loss may use them, and without them torch selects other kernels
            total, weight = 0.0, 0.0
            for term, n in self._read():
                total += self._factor(n) * self._number(term())
                weight += n
            return total / self._positive(weight)

    def gradient(self) -> tuple[float, Vector]:
        """Return L and its gradient, a list of tensors like the parameters. Raises the errors of :meth:`value`."""
        with self._within():
            total, weight = 0.0, 0.0
            sums = self._zeros()
            for term, n in self._read():
                loss = differentiable(term())
                self._add(sums, hvp.gradient([loss], self.params, twice=False), self._factor(n))
                total += self._factor(n) * self._number(loss)
                weight += n
                del loss  # also frees its graph, before the next batch
            return total / self._positive(weight), scaled(sums, 1.0 / weight)

    def product(self, vector: Sequence[Tensor]) -> Vector:
        """Return H v, the Hessian of L times a vector.

        Raises:
            SecondDerivativeError: the loss cannot be differentiated twice. Further errors: :meth:`value`.
            ValueError: the vector's shapes are not those of the parameters.
        """
        wide_vector = vectors.checked(vector, self.params, "a vector")
        with self._within():
            weight = 0.0
            sums = self._zeros()
            v = [x.to(param.dtype) for x, param in zip(wide_vector, self.params, strict=True)]
            for term, n in self._read():
                grads = hvp.gradient([differentiable(term())], self.params, twice=True)
                self._add(sums, hvp.product(grads, self.params, v), self._factor(n))
                weight += n
                del grads
            self._positive(weight)
            return scaled(sums, 1.0 / weight)

    def norm_gradient(self) -> tuple[float, Vector]:
        """Return ‖∇L‖ and its gradient H ∇L/‖∇L‖ (0 if ∇L is 0). Several batches are read twice.

        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> Loss.from_closure(lambda: weight.square().sum() / 2, [weight]).norm_gradient()
        (5.0, [tensor([0.6000, 0.8000])])
        """
        with self._within():
            batches = list(itertools.islice(self._read(), 2)) if self._one_batch else []
            if len(batches) != 1:
                _, grads = self.gradient()
                length = norm(grads)
                return length, self.product(scaled(grads, 1.0 / length)) if length else self._zeros()
            with self._same_state():
                ((term, n),) = batches
                factor = self._factor(n) / n
                found = hvp.gradient([differentiable(term())], self.params, twice=True)
                plain = self._zeros()
                self._add(plain, [None if grad is None else grad.detach() for grad in found], factor)
                length = norm(plain)
                sums = self._zeros()
                if length:
                    pairs = zip(scaled(plain, 1.0 / length), self.params, strict=True)
                    unit = [x.to(param.dtype) for x, param in pairs]
                    self._add(sums, hvp.product(found, self.params, unit), factor)
                return length, sums

    def _within(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._open else self.measuring()

    def seed_generators(self, seed: int) -> None:
        """Seed the generators that draws come from by default; only inside :meth:`measuring`, which restores them."""
        for device in self._devices:
            rng.seed(device, seed)
        for module in rng.global_modules():
            module.seed(seed % 2**32)  # NumPy takes no other

    def _read(self) -> Iterator[tuple[Callable[[], Tensor], float]]:
        """Read the data once, the same each time. Batches without examples are left out."""
        with self._same_state():
            yield from (term for term in self._terms() if term[1] != 0)

    @contextlib.contextmanager
    def _same_state(self) -> Iterator[None]:
        """Start each time from the same random state and buffers; restore both afterwards."""
        buffers = buffers_of(self.model)
        try:
            with rng.kept(self._devices, self._generators):
                self.seed_generators(self.seed)
                for generator in self._generators:
                    generator.manual_seed(self.seed)
                yield
        finally:
            put_back(buffers)

    def _number(self, loss: Tensor) -> float:
        loss = checked(loss).detach()
        if loss.dtype.is_floating_point:
            self.resolution = max(self.resolution, torch.finfo(loss.dtype).eps)
        return float(loss)

    def check(self) -> None:
        """Check, once, that two evaluations of L agree.

        Raises:
            ValueError: they differ.
        """
        if self._known_steady:
            return
        first, second = self.value(), self.value()
        if abs(first - second) > 1e-4 * max(abs(first), abs(second)):
            raise ValueError(
                f"the loss is {first} and, at the same parameters, {second}: something random in model or data does "
                "not come from torch's generators, or is kept from one reading to the next (by persistent_workers of a "
                "DataLoader); seed it, or give data as a list of batches"
            )
        self._known_steady = True

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
        return to_device(batch[0], device), to_device(batch[1], device)
