"""timm: register the optimizers of gam_fast in timm's optimizer factory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from timm.optim import OptimInfo, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.optim._optim_factory import default_registry
from torch import nn

from .. import methods
from ..optimizer import SharpnessAwareOptimizer

_METHODS: list[Any] = [
    kind for kind in vars(methods).values() if isinstance(kind, type) and kind.__module__ == methods.__name__
]


def register_timm() -> list[str]:
    """Let ``timm.optim.create_optimizer_v2`` make these optimizers around every base that timm knows.

    A name is the method followed by the base, in lower case: ``"gamsgd"``, ``"gamadamw"``, ``"samlamb"``,
    ``"gradientnormpenaltyadamw"``. ``"basesgd"`` is the base alone, stepped like the others. Weight decay, layer decay
    and timm's defaults are those of the base. The method's hyper-parameters are keyword arguments. The factory passes
    its model as ``model=``, but not to timm's own optimizers, so one line serves every name. If base and method have a
    hyper-parameter of the same name (``alpha`` of RMSprop), the keyword is the method's. If the package or device of a
    base is missing, its construction raises the error. With timm's prefix ``lookahead_`` only the closure form works.
    Further calls of this function change nothing.

    Returns:
        The names that it added.

    >>> import timm.optim, torch
    >>> from gam_fast.integrations import register_timm
    >>> _ = register_timm()
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = timm.optim.create_optimizer_v2(model, "gamadamw", lr=1e-3, weight_decay=0.05, rho=0.1)
    >>> type(optimizer).__name__, type(optimizer.base).__name__, optimizer.model is model
    ('GAM', 'AdamW', True)
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
    # the factory passes the parameters to an optimizer, but not the module
    create = default_registry.create_optimizer
    if not hasattr(create, "__wrapped__"):
        default_registry.create_optimizer = _with_model(create)
    return added


def _with_model(create: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the factory to pass ``model=`` to the optimizers of gam_fast only."""

    @wraps(create)
    def create_optimizer(model_or_params: Any, opt: str, *args: Any, **arguments: Any) -> Any:
        name = opt.lower().rpartition("_")[2]
        if name not in list_optimizers() or not _is_ours(name):
            arguments.pop("model", None)
        elif isinstance(model_or_params, nn.Module):
            arguments.setdefault("model", model_or_params)
        return create(model_or_params, opt, *args, **arguments)

    return create_optimizer


def _make(
    method: Callable[..., SharpnessAwareOptimizer], base: str, defaults: dict[str, Any], params: Any, **arguments: Any
) -> SharpnessAwareOptimizer:
    # timm's defaults go to the base alone, because method and base may share a hyper-parameter name
    return method(params, partial(get_optimizer_class(base, bind_defaults=False), **defaults), **arguments)


def _is_ours(name: str) -> bool:
    made = get_optimizer_info(name).opt_class
    return isinstance(made, partial) and made.func is _make
