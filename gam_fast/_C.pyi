"""The compiled core. What the operations compute is stated in :mod:`gam_fast.backends.base`.

Numbers are sequences by parameter group. Norms and products are numbers on a CPU, and tensors on a device. All
operations raise ``TypeError`` or ``ValueError`` (``RuntimeError`` for a leaf that requires grad) that names the
argument before anything is written, and release the GIL while they work.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, device, dtype

from .backends.base import Block, Direction, FoldInto, PerGroup, Scalar, TensorList

torch_version: str
"""The version of torch it was built for."""

compiler: str

cuda_architectures: str
"""What the CUDA kernels were compiled for, as in ``TORCH_CUDA_ARCH_LIST``; empty without them."""

class Tensors(list[Tensor]):
    """Tensors that go into several operations; what is found out about them is kept.

    (A sequence of its own, with no method that changes it; a list to type checkers, as torch's annotations ask for it.)
    """

    owned: bool
    """True if nobody but the engine can get at their memory."""

class Versions:
    def first_changed(self, tensors: TensorList) -> int: ...

class Draws:
    """Give the passes of a step the same numbers of torch's default CPU generator, whatever other threads draw."""

    def begin(self) -> None:
        """Start a pass of this thread: the first, whose draws are noted, or another, whose draws are those again."""
    def end(self) -> None: ...
    def pause(self) -> None:
        """In the first pass: what is drawn until :meth:`resume` is not drawn in later ones."""
    def resume(self) -> None: ...
    def can_undo(self) -> bool:
        """Return whether this thread has drawn, and nobody else since the step began."""
    def keep(self) -> None:
        """After the last pass: go on from where it ended, unless it drew nothing or somebody else did."""

# What gam_fast.backends.base.Bookkeeping says; ``tensors`` and ``params`` are of hold().
def hold(tensors: TensorList, before: TensorList | None = None) -> Tensors: ...
def let_go(tensors: TensorList) -> None: ...
def kinds(tensors: TensorList) -> list[tuple[device, dtype, bool]]: ...
def versions(tensors: TensorList) -> Versions: ...
def survey_gradients(params: TensorList, flags: bytearray) -> tuple[list[int], bool, int]: ...
def clear_gradients(params: TensorList, recycle: int, keep_parts: bool = True) -> list[tuple[int, Tensor]]: ...
def take_all_gradients(params: TensorList, versions: Any, flags: bytearray, keep: bool) -> Tensors | None: ...
def take_gradients(params: TensorList, keep: bool) -> Tensors: ...

class Plan:
    """The shapes and groups of the parameters of a block, and how their elements are shared out."""

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
    """An uninitialised tensor like each. Small ones share memory."""

def launches() -> int:
    """How many kernels have been launched in this process."""

def device_types() -> list[str]:
    """Types of the devices that the core was built for."""

def instruction_sets() -> list[str]:
    """Those compiled in that this processor runs, best first."""

def instruction_set() -> str:
    """The one in use."""

def use_instruction_set(name: str) -> None:
    """Use another, in the whole process. Results stay the same to the last bit, but for ``baseline``, without FMA."""
