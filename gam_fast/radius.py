r"""``rho_prime="auto"``: the radius of a finite difference of gradients, from rounding and the scales of the problem.

GAM takes the direction of a Hessian-vector product from :math:`g(θ + ρ'ĝ) − g(θ) = ρ' H ĝ + \tfrac{1}{2} ρ'^2\,T[ĝ,ĝ] +
e`, with ĝ the gradient at length 1, T the third derivatives and e what rounding does to the two gradients. Relative to
:math:`ρ'‖Hĝ‖` the error is

.. math:: \frac{ρ'\,‖T[ĝ,ĝ]‖}{2 ‖Hĝ‖} + \frac{ε ‖g‖}{ρ' ‖Hĝ‖} = \frac{ρ'}{2 ℓ} + \frac{ε ℓ}{ρ'},
    \qquad ℓ = \frac{‖g‖}{‖Hĝ‖} .

ℓ is the distance over which the gradient changes by its own length, and the first term supposes that the curvature
changes over it as well: ``‖T[ĝ,ĝ]‖ = ‖Hĝ‖ / ℓ``. The sum is least, :math:`\sqrt{2ε}`, at :math:`ρ' = \sqrt{2ε}\,ℓ`.
Besides, the point θ + ρ'ĝ is rounded, by a vector as long as ``ε‖θ‖/2`` at most, which the step should not be shorter
than; and where the gradient hardly changes, so that ℓ means nothing, the size of the parameters bounds it:

.. math:: ρ' = \max(\sqrt{2ε}\,\min(ℓ, s),\; ε s/2), \qquad s = \max(‖θ‖, 1) .

‖θ‖ and ε are those of the parameters that require gradients. ℓ is measured by the differences themselves,
``ρ'‖g_0‖/‖g_1 − g_0‖`` of the steps before, by a mean of logarithms; in the first step it is taken for ``s/10``. On an
accelerator, reading these norms waits for the device, at the beginning and at the end of a step.
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
"""The key in ``param_groups`` of ℓ, where a radius is automatic; 0.0 before it was measured."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_DECAY = 0.9


def is_auto(value: Any) -> bool:
    """Return whether it is ``"auto"``, or ``"auto:bfloat16"`` for gradients computed in that type.

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
    """The rounding of the gradients: of the type that ``value`` names, or of the coarsest among the parameters.

    >>> epsilon("auto", [torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)])
    0.0078125
    """
    _, _, named = value.partition(":")
    dtypes = {_DTYPES[named]} if named else {param.dtype for param in params}
    return max(float(torch.finfo(dtype).eps) for dtype in dtypes)


def radius(length: float, size: float, eps: float) -> float:
    """ρ' for a gradient that changes by its own length over ``length``, parameters of norm ``size`` and a rounding.

    >>> radius(length=0.5, size=20.0, eps=2.0**-23)     # fp32: √(2ε)·.5
    0.000244140625
    >>> radius(length=0.06, size=12.0, eps=2.0**-7)     # bf16: the parameters' own rounding, ε·12/2
    0.046875
    """
    size = max(size, 1.0)
    return max(math.sqrt(2.0 * eps) * min(length, size), 0.5 * eps * size)


def next_length(length: float, measured: float, size: float) -> float:
    """ℓ after a step in which ``measured`` was found: infinite if the gradient has not changed; 0.0 is none so far."""
    if math.isnan(measured) or measured <= 0.0:
        return length
    measured = min(measured, max(size, 1.0))
    return math.exp(_DECAY * math.log(length) + (1.0 - _DECAY) * math.log(measured)) if length else measured


@torch.no_grad()
def norm_of(params: Sequence[Tensor]) -> float:
    """‖θ‖ over all parameters, on all devices and, of DTensors, on all processes."""
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
    """Return whether a radius is automatic, in all groups.

    Raises:
        ValueError: in some groups only.
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
    """The automatic radius of one step, and what is kept of the step for the next.

    Args:
        radius: ρ'.
        size: ‖θ‖.
        length: ℓ as it was before the step, 0.0 in the first.
    """

    radius: float
    size: float
    length: float

    @classmethod
    def of(cls, groups: Sequence[dict[str, Any]], hyper: Sequence[dict[str, Any]], name: str) -> Difference | None:
        """For hyper-parameters whose ``name`` is automatic, which becomes a number there; ``None`` if it is one.

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
        """Return what the groups keep, ``change`` being ‖g1 − g0‖/‖g0‖."""
        measured = math.inf if change == 0.0 else self.radius / change
        return {LENGTH: next_length(self.length, measured, self.size)}
