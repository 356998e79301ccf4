"""The compiled core. What the operations compute is stated in :mod:`gam_fast.backends.base`.

Numbers are sequences by parameter group. On a CPU they are all there is: ``square`` is None, and a direction has ``p``
only. All operations raise ``TypeError`` or ``ValueError``
(``RuntimeError`` for a leaf that requires grad) that names the argument before anything is written, and release the GIL
while they work.
"""

from collections.abc import Sequence

from torch import Tensor

from .backends.base import AdamGroup, Direction, FoldInto, Leaves, PerGroup, Scalar, SGDGroup, TensorList

torch_version: str
"""The version of torch it was built for."""

compiler: str

cuda_architectures: str
"""What the CUDA kernels were compiled for, as in ``TORCH_CUDA_ARCH_LIST``; empty without them."""

class Plan:
    """The shapes, dtypes and groups of the parameters of one device, and how their elements are shared out."""

    def __init__(self, params: TensorList, group: Sequence[int]) -> None: ...
    def fits(self, params: TensorList, group: Sequence[int]) -> bool: ...

def square_norm(plan: Plan, leaves: Leaves, a: TensorList, b: TensorList | None, eta: PerGroup | None) -> Tensor: ...
def perturb(
    plan: Plan,
    leaves: Leaves,
    a: TensorList,
    b: TensorList | None,
    radius: Sequence[Scalar],
    square: Tensor | None,
    from_start: bool,
    eta: PerGroup | None,
    folds: Sequence[FoldInto],
) -> None: ...
def inner_products(
    plan: Plan, terms: Sequence[TensorList], p: Sequence[PerGroup], m: Sequence[PerGroup] | None, groups: int
) -> Tensor: ...
def restore(plan: Plan, leaves: Leaves) -> None: ...
def direction(plan: Plan, leaves: Leaves, d: Direction, out: TensorList) -> None: ...
def sgd(
    plan: Plan,
    leaves: Leaves,
    d: Direction,
    momentum_buffer: Sequence[Tensor | None],
    first: Sequence[bool],
    groups: Sequence[SGDGroup],
) -> None: ...
def adam(
    plan: Plan,
    leaves: Leaves,
    d: Direction,
    exp_avg: TensorList,
    exp_avg_sq: TensorList,
    max_exp_avg_sq: Sequence[Tensor | None],
    step: Sequence[float],
    groups: Sequence[AdamGroup],
) -> None: ...
def empty_like(tensors: TensorList) -> TensorList:
    """An uninitialised dense tensor like each."""

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
