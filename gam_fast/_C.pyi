"""The compiled core. :mod:`gam_fast.backends.base` states what each operation computes.

Scalars that differ by parameter group are sequences indexed by group. Norms and products are Python numbers on a CPU
and tensors on a device. Every operation checks its arguments before it writes anything, and raises ``TypeError`` or
``ValueError`` (``RuntimeError`` for a leaf that requires grad) that names the argument. Operations release the GIL
while they work.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, device, dtype

from .backends.base import Block, Direction, FoldInto, PerGroup, Scalar, TensorList

torch_version: str
"""The version of torch that the core was built for."""

compiler: str

cuda_architectures: str
"""The architectures of the CUDA kernels, as in ``TORCH_CUDA_ARCH_LIST``; empty without CUDA kernels."""

class Tensors(list[Tensor]):
    """A list of tensors for several operations, which keeps the results of checking them.

    It is a sequence type of its own without methods that change it. Type checkers see a list, because torch's
    annotations ask for one.
    """

    owned: bool
    """True if no code outside the engine can reach their memory."""

class Versions:
    def first_changed(self, tensors: TensorList) -> int: ...

class Draws:
    """Replay the draws from torch's default CPU generator in each pass of a step, even if other threads draw too."""

    def begin(self) -> None:
        """Start a pass in this thread. The first pass records its draws, later passes repeat them."""
    def end(self) -> None: ...
    def pause(self) -> None:
        """Stop recording, in the first pass, until :meth:`resume`: later passes skip these draws."""
    def resume(self) -> None: ...
    def can_undo(self) -> bool:
        """Return whether this thread, and no other, has drawn since the step began."""
    def keep(self) -> None:
        """Continue from the end of the last pass, unless it drew nothing or another thread drew."""

# See gam_fast.backends.base.Bookkeeping. ``tensors`` and ``params`` are results of hold().
def hold(tensors: TensorList, before: TensorList | None = None) -> Tensors: ...
def let_go(tensors: TensorList) -> None: ...
def kinds(tensors: TensorList) -> list[tuple[device, dtype, bool]]: ...
def versions(tensors: TensorList) -> Versions: ...
def count_steps(steps: Sequence[Tensor], write: bool) -> list[float]: ...
def survey_gradients(params: TensorList, flags: bytearray) -> tuple[list[int], bool, int]: ...
def clear_gradients(params: TensorList, recycle: int, keep_parts: bool = True) -> list[tuple[int, Tensor]]: ...
def take_all_gradients(params: TensorList, versions: Any, flags: bytearray, keep: bool) -> Tensors | None: ...
def take_gradients(params: TensorList, keep: bool) -> Tensors: ...

class Plan:
    """The shapes and groups of a block's parameters, and how their elements are divided into chunks."""

    def __init__(self, params: TensorList, group: Sequence[int]) -> None: ...
    def fits(self, params: TensorList, group: Sequence[int]) -> bool: ...
    def takes_state(self, state: Sequence[Sequence[Tensor | None]]) -> bool:
        """Return whether lists of such tensors can be the state of a base optimizer."""

def square_norm(plan: Plan, leaves: Block, a: TensorList, b: TensorList | None, eta: PerGroup | None) -> Tensor: ...
def perturb(
    plan: Plan,
    leaves: Block,
    a: TensorList,
    b: TensorList | None,
    radius: PerGroup,
    square: Scalar,
    from_start: bool,
    eta: PerGroup | None,
    fold: FoldInto | None,
    multiple: PerGroup | None = None,
) -> None: ...
def inner_products(
    plan: Plan, terms: Sequence[TensorList], p: Sequence[PerGroup], m: Sequence[PerGroup] | None, groups: int
) -> Tensor: ...
def restore(plan: Plan, leaves: Block) -> None: ...
def direction(plan: Plan, leaves: Block, d: Direction, out: TensorList) -> None: ...
def update(
    plan: Plan,
    leaves: Block,
    d: Direction,
    formula: str,
    state: Sequence[Sequence[Tensor | None]],
    groups: Sequence[Sequence[float]],
    options: Sequence[Sequence[float]],
    option: Sequence[int],
) -> None: ...
def empty_like(tensors: TensorList) -> Tensors:
    """Return an uninitialised tensor like each. Small tensors share one allocation."""

def launches() -> int:
    """Return the number of kernels launched in this process."""

def device_types() -> list[str]:
    """Return the device types that the core was built for."""

def instruction_sets() -> list[str]:
    """Return the compiled instruction sets that this processor supports, best first."""

def instruction_set() -> str:
    """Return the instruction set in use."""

def use_instruction_set(name: str) -> None:
    """Select an instruction set for the whole process. Only ``baseline``, without FMA, changes the results' bits."""
