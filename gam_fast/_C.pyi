"""The compiled core. What the operations compute is stated in :mod:`gam_fast.backends.base`.

Factors and hyper-parameters are sequences by parameter group. All operations raise ``TypeError`` or ``ValueError``
(``RuntimeError`` for a leaf that requires grad) that names the argument before anything is written, and release the GIL
while they work.
"""

from collections.abc import Sequence

from torch import Tensor

from .backends.base import AdamGroup, FoldInto, Leaves, PerGroup, Scalar, SGDGroup, TensorList

torch_version: str
"""The version of torch it was built for."""

compiler: str

class Plan:
    """How the elements of parameters are shared out among threads; it depends on shapes, dtypes and groups only."""

    def __init__(self, params: TensorList, group: Sequence[int]) -> None: ...
    def fits(self, params: TensorList, group: Sequence[int]) -> bool: ...

def square_norm(plan: Plan, leaves: Leaves, a: TensorList, b: TensorList | None, eta: PerGroup | None) -> Tensor: ...
def perturb(
    plan: Plan,
    leaves: Leaves,
    a: TensorList,
    b: TensorList | None,
    factor: Sequence[Scalar],
    from_start: bool,
    eta: PerGroup | None,
    folds: Sequence[FoldInto],
) -> None: ...
def inner_products(
    plan: Plan,
    terms: Sequence[TensorList],
    factors: Sequence[Sequence[Scalar]],
    m_factors: Sequence[Sequence[Scalar]] | None,
    groups: int,
) -> Tensor: ...
def restore(plan: Plan, leaves: Leaves) -> None: ...
def direction(
    plan: Plan, leaves: Leaves, terms: Sequence[TensorList], factors: Sequence[Sequence[Scalar]], out: TensorList
) -> None: ...
def sgd(
    plan: Plan,
    leaves: Leaves,
    terms: Sequence[TensorList],
    factors: Sequence[Sequence[Scalar]],
    momentum_buffer: Sequence[Tensor | None],
    first: Sequence[bool],
    groups: Sequence[SGDGroup],
) -> None: ...
def adam(
    plan: Plan,
    leaves: Leaves,
    terms: Sequence[TensorList],
    factors: Sequence[Sequence[Scalar]],
    exp_avg: TensorList,
    exp_avg_sq: TensorList,
    max_exp_avg_sq: Sequence[Tensor | None],
    step: Sequence[float],
    groups: Sequence[AdamGroup],
) -> None: ...
def empty_like(tensors: TensorList) -> TensorList:
    """An uninitialised dense tensor like each."""

def instruction_sets() -> list[str]:
    """Those compiled in that this processor runs, best first."""

def instruction_set() -> str:
    """The one in use."""

def use_instruction_set(name: str) -> None:
    """Use another, in the whole process. Results stay the same to the last bit, but for ``baseline``, without FMA."""
