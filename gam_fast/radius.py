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

.. math:: ρ' = \max(\sqrt{2ε}\,\min(ℓ, ‖θ‖),\; ε‖θ‖/2) .

ℓ is measured by the differences themselves, ``ρ'‖g_0‖/‖g_1 − g_0‖`` of the steps before, by a mean of logarithms; in
the first step it is taken for ``‖θ‖/10``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AUTO = "auto"
LENGTH, NORM = "flat_length", "flat_norm"
"""The keys in ``param_groups`` of ℓ and of ‖θ‖, where a radius is automatic."""

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_DECAY = 0.9


def is_auto(value: Any) -> bool:
    """Whether it asks for an automatic radius: ``"auto"``, or ``"auto:bfloat16"`` for gradients computed in that type.

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


def radius(length: float, norm: float, eps: float) -> float:
    """ρ' for a gradient that changes by its own length over ``length``, parameters of norm ``norm`` and a rounding.

    >>> radius(length=0.5, norm=20.0, eps=2.0**-23)     # fp32: √(2ε)·.5
    0.000244140625
    >>> radius(length=0.06, norm=12.0, eps=2.0**-7)     # bf16: the parameters' own rounding, ε·12/2
    0.046875
    """
    return max(math.sqrt(2.0 * eps) * min(length, norm), 0.5 * eps * norm)


def next_length(length: float, measured: float, *, first: bool) -> float:
    """ℓ after a step in which ``measured`` was found, which is ignored if it is no positive number."""
    if not (math.isfinite(measured) and measured > 0.0):
        return length
    if first:
        return measured
    return math.exp(_DECAY * math.log(length) + (1.0 - _DECAY) * math.log(measured))


@torch.no_grad()
def norm_of(params: Sequence[Tensor]) -> float:
    """‖θ‖ over all parameters, on all devices and, of a DTensor, on all processes; at least 1e-12."""
    total = 0.0
    for param in params:
        norm = torch.linalg.vector_norm(param, dtype=torch.promote_types(param.dtype, torch.float32))
        total += float(getattr(norm, "full_tensor", lambda norm=norm: norm)()) ** 2
    return max(math.sqrt(total), 1e-12)


@dataclass(frozen=True)
class Difference:
    """The automatic radius of one step, and what is kept of the step for the next.

    Args:
        radius: ρ'.
        norm: ‖θ‖, when it was taken.
        length: ℓ as it was before the step, ``None`` in the first.
    """

    radius: float
    norm: float
    length: float | None

    @classmethod
    def of(cls, groups: Sequence[dict[str, Any]], hyper: Sequence[dict[str, Any]], name: str) -> Difference | None:
        """For hyper-parameters whose ``name`` is automatic, which becomes a number there; ``None`` if it is one.

        Raises:
            ValueError: it is automatic in some groups only.
        """
        words = [value for h in hyper if is_auto(value := h[name])]
        if not words:
            return None
        if len(words) < len(hyper):
            raise ValueError(
                f"{name} is {words[0]!r} in some parameter groups and a number in others, but the difference is of the "
                "gradient as a whole: give all groups a number, or all of them 'auto'"
            )
        params = [param for group in groups for param in group["params"]]
        norm = float(groups[0].get(NORM) or norm_of(params))
        length = groups[0].get(LENGTH)
        chosen = radius(0.1 * norm if length is None else length, norm, max(epsilon(word, params) for word in words))
        for h in hyper:
            h[name] = chosen
        return cls(chosen, norm, length)

    def after(self, change: float) -> dict[str, float]:
        """What the groups keep, ``change`` being ‖g1 − g0‖/‖g0‖."""
        measured = self.radius / change if change > 0.0 else math.inf
        if self.length is None:
            length = next_length(0.1 * self.norm, measured, first=True)
        else:
            length = next_length(self.length, measured, first=False)
        return {LENGTH: length, NORM: self.norm}
