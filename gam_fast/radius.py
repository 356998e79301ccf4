r"""``rho_prime="auto"``: choose the radius of a finite difference of gradients from rounding errors and scales.

GAM takes the direction of a Hessian-vector product from :math:`g(θ + ρ'ĝ) − g(θ) = ρ' H ĝ + \tfrac{1}{2} ρ'^2\,T[ĝ,ĝ] +
e`. Here ĝ is the normalised gradient, T the tensor of third derivatives, and e the rounding error of the two gradients.
Relative to :math:`ρ'‖Hĝ‖` the error is

.. math:: \frac{ρ'\,‖T[ĝ,ĝ]‖}{2 ‖Hĝ‖} + \frac{ε ‖g‖}{ρ' ‖Hĝ‖} = \frac{ρ'}{2 ℓ} + \frac{ε ℓ}{ρ'},
    \qquad ℓ = \frac{‖g‖}{‖Hĝ‖} .

ℓ is the distance over which the gradient changes by its own length. The first term assumes that the curvature changes
over the same distance: :math:`‖T[ĝ,ĝ]‖ = ‖Hĝ‖ / ℓ`. The sum has its minimum :math:`\sqrt{2ε}` at
:math:`ρ' = \sqrt{2ε}\,ℓ`. Two bounds are added. The point θ + ρ'ĝ is rounded by a vector of length at most
:math:`ε‖θ‖/2`, and the step should not be shorter than that. If the gradient hardly changes, ℓ means nothing, and the
size of the parameters bounds it:

.. math:: ρ' = \max(\sqrt{2ε}\,\min(ℓ, s),\; ε s/2), \qquad s = \max(‖θ‖, 1) .

‖θ‖ and ε are those of the parameters that require gradients. ℓ is measured by the differences of earlier steps,
:math:`ρ'‖g_0‖/‖g_1 − g_0‖`, with a mean of logarithms; the first step takes :math:`s/10`. On an accelerator, reading
these norms waits for the device at the beginning and at the end of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import refuse_to_look

AUTO = "auto"
LENGTH = "flat_length"
"""The key in ``param_groups`` for ℓ of an automatic radius; 0.0 before the first measurement."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_DECAY = 0.9


def is_auto(value: Any) -> bool:
    """Return whether ``value`` is ``"auto"``, or ``"auto:bfloat16"`` for gradients computed in bfloat16.

    Raises:
        ValueError: the type after the colon is not one that autocast computes in.

    >>> is_auto("auto"), is_auto("auto:bfloat16"), is_auto(0.02)
    (True, True, False)
    """
    if not isinstance(value, str):
        return False
    word, colon, dtype = value.partition(":")
    if word != AUTO or (colon and dtype not in _DTYPES):
        raise ValueError(f"a radius in words is 'auto', or 'auto:' and one of {', '.join(_DTYPES)}, got {value!r}")
    return True


def epsilon(value: str, params: Iterable[Tensor]) -> float:
    """Return the gradients' rounding unit: of the dtype that ``value`` names, or of the coarsest parameter.

    >>> epsilon("auto", [torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)])
    0.0078125
    """
    _, _, named = value.partition(":")
    dtypes = {_DTYPES[named]} if named else {param.dtype for param in params}
    return max(float(torch.finfo(dtype).eps) for dtype in dtypes)


def radius(length: float, size: float, eps: float) -> float:
    """Return ρ' from ``length`` = ℓ, ``size`` = ‖θ‖ and ``eps`` = ε.

    >>> radius(length=0.5, size=20.0, eps=2.0**-23)     # fp32: √(2ε)·.5
    0.000244140625
    >>> radius(length=0.06, size=12.0, eps=2.0**-7)     # bf16: the parameters' own rounding, ε·12/2
    0.046875
    """
    size = max(size, 1.0)
    return max(math.sqrt(2.0 * eps) * min(length, size), 0.5 * eps * size)


def next_length(length: float, measured: float, size: float) -> float:
    """Return ℓ updated by ``measured`` (infinite if the gradient has not changed); ``length`` 0.0 means none yet."""
    if math.isnan(measured) or measured <= 0.0:
        return length
    measured = min(measured, max(size, 1.0))
    return math.exp(_DECAY * math.log(length) + (1.0 - _DECAY) * math.log(measured)) if length else measured


@torch.no_grad()
def norm_of(params: Sequence[Tensor]) -> float:
    """Return ‖θ‖ over all parameters, devices and, for DTensors, processes."""
    together: dict[Any, list[Tensor]] = {}
    for param in params:
        together.setdefault((param.device, param.dtype, getattr(param, "device_mesh", None)), []).append(param)
    total = 0.0
    for (_, dtype, mesh), own in together.items():
        if mesh is None:
            norms = torch._foreach_norm(own, 2, dtype=torch.promote_types(dtype, torch.float32))
            total += float(torch.stack(norms).square().sum())
        else:
            norm: Any = torch.nn.utils.get_total_norm(own)
            total += float(norm.full_tensor()) ** 2
    return math.sqrt(total)


def check_alike(name: str, values: Sequence[Any]) -> bool:
    """Return whether a radius is automatic in all groups.

    Raises:
        ValueError: it is automatic in some groups only.
    """
    words = [value for value in values if isinstance(value, str) and is_auto(value)]
    if 0 < len(words) < len(values):
        raise ValueError(
            f"{name} is {words[0]!r} in some parameter groups and a number in others, but the difference is of the "
            "gradient as a whole: give all groups a number, or all of them 'auto'"
        )
    return bool(words)


@dataclass(frozen=True)
class Difference:
    """The automatic radius of one step, and the length that it updates for the next step.

    Args:
        radius: ρ'.
        size: ‖θ‖.
        length: ℓ before the step; 0.0 in the first.
    """

    radius: float
    size: float
    length: float

    @classmethod
    def of(cls, groups: Sequence[dict[str, Any]], hyper: Sequence[dict[str, Any]], name: str) -> Difference | None:
        """Replace an automatic ``name`` in ``hyper`` by its number; return ``None`` if it is a number already.

        Raises:
            ValueError: it is automatic in some groups only.
            RuntimeError: it is automatic, and a CUDA graph is being captured.
        """
        if not check_alike(name, [h[name] for h in hyper]):
            return None
        params = [param for group in groups for param in group["params"] if param.requires_grad]
        refuse_to_look(["an automatic radius"], {param.device for param in params})
        size = norm_of(params)
        length = float(groups[0].get(LENGTH, 0.0))
        eps = max((epsilon(h[name], params) for h in hyper), default=0.0) if params else 0.0
        chosen = radius(length or 0.1 * max(size, 1.0), size, eps)
        for h in hyper:
            h[name] = chosen
        return cls(chosen, size, length)

    def after(self, change: float) -> dict[str, float]:
        """Return the values that the groups keep, from ``change`` = ‖g1 − g0‖/‖g0‖."""
        measured = math.inf if change == 0.0 else self.radius / change
        return {LENGTH: next_length(self.length, measured, self.size)}
