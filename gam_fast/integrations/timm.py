"""timm: the optimizers of gam_fast in the registry of its optimizer factory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.optim import OptimInfo, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim._optim_factory import default_registry

from .. import methods
from ..optimizer import FlatOptimizer

_METHODS = (
    methods.GAM,
    methods.SAM,
    methods.ASAM,
    methods.GSAM,
    methods.GradientNormPenalty,
    methods.ExactGAM,
    methods.CFlat,
    methods.FAD,
)


def register_timm() -> list[str]:
    """Let ``timm.optim.create_optimizer_v2`` make these optimizers around every base that timm knows.

    A name is that of the method followed by that of the base, in lower case: ``"gamsgd"``, ``"gamadamw"``,
    ``"samlamb"``, ``"gradientnormpenaltyadamw"``. Weight decay, layer decay and timm's defaults are those of the base;
    the method's hyper-parameters, and ``model=``, are keyword arguments. Where base and method have one of the same
    name (``alpha`` of RMSprop), it is the method's. A base whose package or device is missing says so when it is made;
    with timm's prefix ``lookahead_`` there is the closure form only. Calling it again changes nothing.

    Returns the names that it added.

    >>> import timm.optim, torch
    >>> from gam_fast.integrations import register_timm
    >>> _ = register_timm()
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = timm.optim.create_optimizer_v2(model, "gamadamw", lr=1e-3, weight_decay=0.05, rho=0.1, model=model)
    >>> type(optimizer).__name__, type(optimizer.base).__name__
    ('GAM', 'AdamW')
    >>> [(group["weight_decay"], group["rho"]) for group in optimizer.param_groups]  # no decay of the bias
    [(0.0, 0.1), (0.05, 0.1)]
    """
    bases = [name for name in list_optimizers() if not _is_ours(name) and not get_optimizer_info(name).second_order]
    known = set(list_optimizers())
    added = []
    for method in _METHODS:
        for base in bases:
            name = f"{method.__name__.lower()}{base}"
            if name in known:
                continue
            info = get_optimizer_info(base)
            default_registry.register(
                OptimInfo(
                    name=name,
                    opt_class=partial(_make, method, base, info.defaults or {}),
                    description=f"{method.recipe.name} (gam_fast) around {base}",
                    has_eps=info.has_eps,
                    has_momentum=info.has_momentum,
                    has_betas=info.has_betas,
                    num_betas=info.num_betas,
                )
            )
            added.append(name)
    return added


def _make(
    method: Callable[..., FlatOptimizer], base: str, defaults: dict[str, Any], params: Any, **arguments: Any
) -> FlatOptimizer:
    # timm's defaults go to the base, which may have a hyper-parameter of the same name as the method
    return method(params, partial(get_optimizer_class(base, bind_defaults=False), **defaults), **arguments)


def _is_ours(name: str) -> bool:
    made = get_optimizer_info(name).opt_class
    return isinstance(made, partial) and made.func is _make
