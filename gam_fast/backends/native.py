"""The compiled core: one fused sweep over memory for each primitive.

On a CPU, all of torch's threads share a sweep. On a GPU a sweep is one launch; sums take a second launch, of one block
per group.

On a GPU a step never waits for the device: kernels read norms and products from device memory, and tables of addresses
are copied to the device, asynchronously, only when they have changed. The relative error of a sum of squares does not
depend on the number of elements: at most 9 · 2⁻²⁴ = 5.4e-7 for fp32 numbers, 5 · 2⁻²⁴ for 16-bit numbers and 2 · 10⁻¹⁴
for fp64 numbers. A thread adds up 8 numbers in fp32 in each of its accumulators; all further additions are in fp64, in
an order that depends only on the numbers of elements (``csrc/cuda/sums.cu``).

If the core was not built or does not fit this torch, importing this module raises ``ImportError`` with the reason. The
error's ``path`` is the file of a core that does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from . import scalars
from .base import Block, Bookkeeping, Direction, FoldInto, PerGroup, Scalar, TensorList

_IN_CHECKOUT = (Path(__file__).parents[2] / "setup.py").is_file()  # these are the sources, not what was installed
INSTALL = (
    f"pip install --no-build-isolation {'-e ' * _IN_CHECKOUT}. (in a checkout of gam_fast; torch, ninja and a C++17 "
    "compiler are needed)"
)

try:
    from .. import _C
except ImportError as error:
    _spec = find_spec(f"{(__package__ or '').rpartition('.')[0]}._C")
    _file = None if _spec is None else _spec.origin
    if _file is None:
        raise ImportError(f"the compiled core cannot be loaded ({error}); {INSTALL} builds it") from error
    _stamp = re.search(rb"Built for torch ([\w.+]*\w)", Path(_file).read_bytes())  # in the docstring of the core
    _was = _stamp[1].decode() if _stamp else "another version"
    raise ImportError(
        f"the compiled core cannot be loaded ({error}). It was built for torch {_was}, this is {torch.__version__}; "
        f"{INSTALL} builds it anew",
        path=_file,
    ) from error


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


if _release(_C.torch_version) != _release(torch.__version__):
    raise ImportError(
        f"the compiled core was built for torch {_C.torch_version}, this is {torch.__version__}; {INSTALL} builds it "
        "anew",
        path=_C.__file__,
    )


MAX_PLANS = 4
"""Number of plans that an optimizer keeps on each device."""


def _why_not_on(device: torch.device) -> str | None:
    """Return why the kernels do not run on this GPU. Code runs on the same major version, PTX on all newer ones."""
    capability = torch.cuda.get_device_capability(device)
    if runs_on(capability, _C.cuda_architectures):
        return None
    return (
        f"the compiled core has CUDA code for {_C.cuda_architectures}, the GPU is of {capability[0]}.{capability[1]}; "
        "TORCH_CUDA_ARCH_LIST chooses at installation"
    )


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Return whether code for a list such as ``8.0;9.0+PTX`` runs on a GPU of this compute capability.

    >>> [runs_on(capability, "8.0;9.0+PTX") for capability in ((7, 5), (8, 6), (9, 0), (10, 0))]
    [False, True, True, True]
    """
    for name in architectures.replace(" ", ";").split(";"):
        major, _, minor = name.removesuffix("+PTX").partition(".")
        built = (int(major), int("".join(filter(str.isdigit, minor)) or 0)) if major.isdigit() else None
        if built and (built[0] == capability[0] or name.endswith("+PTX")) and built <= capability:
            return True
    return False


class NativeBackend:
    """Compiled implementation of :class:`gam_fast.backends.base.Backend`, which documents the primitives."""

    name = "native"
    core = _C

    def __init__(self) -> None:
        self._plans: list[_C.Plan] = []  # most recently used first
        self._device: torch.device | None = None  # of norms and products; None on a CPU

    @property
    def bookkeeping(self) -> Bookkeeping:
        return self.core

    @staticmethod
    def describe() -> str:
        return (
            f"C++ on {' and '.join(_C.device_types())} tensors, {_C.instruction_set()} code, compiled by {_C.compiler} "
            f"for torch {_C.torch_version}"
        )

    @staticmethod
    def refusal(device: torch.device) -> str | None:
        if device.type in _C.device_types():
            return _why_not_on(device) if device.type == "cuda" else None
        return f"the compiled core was built for {' and '.join(_C.device_types())} tensors only"

    def _plan_for(self, leaves: Block) -> _C.Plan:
        """Return an earlier plan that fits, or a new one. Look once per step, and again when leaves were added.

        Several plans are kept, for models in which the participating parameters alternate.
        """
        for found in self._plans:
            if found.fits(leaves.params, leaves.group):
                self._plans.remove(found)
                break
        else:
            found = self.core.Plan(leaves.params, leaves.group)
        self._plans = [found, *self._plans[: MAX_PLANS - 1]]
        device = leaves.params[0].device
        self._device = None if device.type == "cpu" else device
        leaves.prepared = found
        return found

    def allocate(self, like: TensorList) -> TensorList:
        return self.core.empty_like(like)

    def square_norm(
        self, leaves: Block, a: TensorList, b: TensorList | None = None, eta: PerGroup | None = None
    ) -> Tensor:
        return self.core.square_norm(leaves.prepared or self._plan_for(leaves), leaves, a, b, eta)

    def perturb(
        self,
        leaves: Block,
        a: TensorList,
        b: TensorList | None,
        radius: PerGroup,
        square: Scalar,
        *,
        from_start: bool,
        eta: PerGroup | None = None,
        fold: FoldInto | None = None,
        multiple: PerGroup | None = None,
    ) -> None:
        plan = leaves.prepared or self._plan_for(leaves)
        if self._device is not None:
            square = scalars.on_device(square, self._device)
        self.core.perturb(plan, leaves, a, b, radius, square, from_start, eta, fold, multiple)

    def inner_products(self, leaves: Block, u: Direction, m: Direction | None, groups: int) -> Tensor:
        plan = leaves.prepared or self._plan_for(leaves)
        return self.core.inner_products(plan, u.terms, u.p, None if m is None else m.p, groups)

    def restore(self, leaves: Block) -> None:
        if leaves.saved:
            self.core.restore(leaves.prepared or self._plan_for(leaves), leaves)

    def direction(self, leaves: Block, d: Direction, out: TensorList) -> None:
        plan = leaves.prepared or self._plan_for(leaves)
        self.core.direction(plan, leaves, d if self._device is None else self._on_device(d), out)

    def takes_state(self, leaves: Block, state: Sequence[Sequence[Tensor | None]]) -> bool:
        plan = leaves.prepared or self._plan_for(leaves)
        return plan.takes_state(state)

    def update(
        self,
        leaves: Block,
        d: Direction,
        formula: str,
        state: Sequence[Sequence[Tensor | None]],
        groups: Sequence[Sequence[float]],
        options: Sequence[Sequence[float]],
        option: Sequence[int],
    ) -> None:
        plan = leaves.prepared or self._plan_for(leaves)
        d = d if self._device is None else self._on_device(d)
        self.core.update(plan, leaves, d, formula, state, groups, options, option)

    def _on_device(self, d: Direction) -> Direction:
        """Return ``d`` with its products in device memory, where kernels read them."""
        assert self._device is not None
        return d if d.products is None else replace(d, products=scalars.on_device(d.products, self._device))
