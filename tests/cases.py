"""The one table of cases: models with data, methods with their reference, base optimizers."""

from __future__ import annotations

import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import reference
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gam_fast

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process is one of Triton's interpreter, which tests the Triton kernels and nothing else."""

WITHOUT_CORE = os.environ.get("GAM_FAST_BUILD") == "none"

BACKENDS = ["triton"] if INTERPRETED else ["eager"] if WITHOUT_CORE else ["eager", "native"]
"""Those of every primitive; the engine is tested on the last. Without the compiled core only where that is said."""

CAN_EMULATE = "native" in BACKENDS and sys.platform == "linux" and platform.machine() == "x86_64"
"""Whether a compiler is expected, and the emulator knows the processor."""

EMULATED = ["emulated"] if CAN_EMULATE else []
"""The CUDA core on the CPU (see emulated.py)."""

OTHERS = BACKENDS if INTERPRETED else [*BACKENDS[:-1], *EMULATED]
"""Those that the engine is tested on by the short table of test_every_backend.py."""

SANITIZED = bool(os.environ.get("GAM_FAST_SANITIZED"))

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
if SANITIZED:  # one of those that the loops see as they are stored, and the one that they do not
    DTYPES = [torch.float32, torch.float16]


def pairwise(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Few rows of one value a factor, in which any two values of two factors meet.

    A fault that takes two of them is found, in a fraction of the rows of all combinations.
    """
    values = [list(factor) for factor in factors]
    columns = list(itertools.combinations(range(len(values)), 2))
    missing = {(i, a, j, b): None for i, j in columns for a in range(len(values[i])) for b in range(len(values[j]))}
    rows = []
    while missing:
        i, a, j, b = next(iter(missing))
        row = {i: a, j: b}
        for k in range(len(values)):
            if k not in row:
                meets = [
                    sum((*min((k, v), m), *max((k, v), m)) in missing for m in row.items())
                    for v in range(len(values[k]))
                ]
                row[k] = meets.index(max(meets))
        for i, j in columns:
            missing.pop((i, row[i], j, row[j]), None)
        rows.append(tuple(values[k][row[k]] for k in range(len(values))))
    return rows


def in_turn(*factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """As few rows of one value a factor as it takes for each value to come once."""
    values = [list(factor) for factor in factors]
    return [tuple(each[i % len(each)] for each in values) for i in range(max(map(len, values)))]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BatchNormCNN(nn.Module):
    """Smooth, so that trajectories compare: tanh for relu. No bias before a normalisation: its gradient is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Conv2d(4, 5, 3, bias=False),
            nn.BatchNorm2d(5),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(5 * 2 * 2, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TiedTransformer(nn.Module):
    """One block of causal attention; the output layer is the embedding's own weight."""

    def __init__(self, vocabulary: int = 7, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(5, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 12), nn.GELU(), nn.Linear(12, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) / (width // self.heads) ** 0.5
        mask = torch.full((t, t), float("-inf"), dtype=x.dtype).triu(1)
        mixed = (scores + mask).softmax(-1) @ v
        x = x + self.project(mixed.transpose(1, 2).reshape(n, t, width))
        x = x + self.mlp(x)
        return self.head(x)[:, -1]


class WithDropout(nn.Module):
    """A model with dropout in front of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.2)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.dropout(x))


class PartlyUsed(nn.Module):
    """A frozen layer, a layer nobody calls, and one that takes part in every other call only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(8, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.frozen(torch.tanh(self.first(x)))))


def images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 1, 8, 8, dtype=torch.float64), torch.randint(3, (batch,))


def vectors(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 6, dtype=torch.float64), torch.randint(3, (batch,))


def sequences(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(7, (batch, 5)), torch.randint(7, (batch,))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, Tensor]]]] = {
    "mlp": (MLP, vectors),
    "batchnorm_cnn": (BatchNormCNN, images),
    "tied_transformer": (TiedTransformer, sequences),
    "partly_used": (PartlyUsed, vectors),
}


def make(
    name: str, dtype: torch.dtype = torch.float64, batches: int = 4
) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The model and its data, the same at every call."""
    build, data = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = build().to(dtype)
        batch = [data(12) for _ in range(batches)]
    return model, [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in batch]


def weights_and_biases(model: nn.Module, **of_biases: Any) -> list[dict[str, Any]]:
    """Return two groups, the weights and the biases. The second may have values of its own."""
    weights, biases = ([p for p in model.parameters() if (p.dim() > 1) is flag] for flag in (True, False))
    return [{"params": weights}, {"params": biases, **of_biases}]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    return F.cross_entropy(logits.double() if logits.dtype == torch.float64 else logits.float(), y)


def closure_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    return closure


FORMS = ["loop", "closure"]


def take_step(optimizer: gam_fast.SharpnessAwareOptimizer, body: Callable[..., Any], form: str, **options: Any) -> None:
    """A step in either form; the body gets its turn if it has an argument of that name."""
    if form == "closure":
        optimizer.step(body, **options)
        return
    evaluate = gam_fast.turn.evaluation(body)
    for turn in optimizer.passes(**options):
        evaluate(turn)


@dataclass(frozen=True)
class Method:
    """A class of gam_fast, its plain reference, and values for its hyper-parameters."""

    optimizer: type[gam_fast.SharpnessAwareOptimizer]
    reference: Callable[..., list[Tensor]]
    hyper: dict[str, Any] = field(default_factory=dict)

    @property
    def passes(self) -> int:
        return self.optimizer.recipe.passes

    @property
    def of_groups(self) -> list[str]:
        return [name for name, value in self.hyper.items() if type(value) is float]


METHODS: dict[str, Method] = {
    "base": Method(gam_fast.Base, reference.base),
    "sam": Method(gam_fast.SAM, reference.sam, {"rho": 0.1}),
    "asam": Method(gam_fast.ASAM, reference.asam, {"rho": 0.4, "eta": 0.01}),
    "gsam": Method(gam_fast.GSAM, reference.gsam, {"rho": 0.1, "alpha": 0.4}),
    "penalty": Method(gam_fast.GradientNormPenalty, reference.gradient_norm_penalty, {"rho": 0.1, "alpha": 0.7}),
    "gam": Method(
        gam_fast.GAM, reference.gam, {"rho": 0.2, "rho_prime": 0.1, "alpha": 0.6, "beta": 0.3, "gamma": 0.05}
    ),
    "gam_release": Method(
        gam_fast.GAM, reference.gam, {"rho": 0.2, "rho_prime": 0.1, "alpha": 0.6, "beta": (1.0, 0.7), "gamma": 0.05}
    ),
    "cflat": Method(gam_fast.CFlat, reference.cflat, {"rho": 0.15, "lam": 0.3}),
    "fad": Method(gam_fast.FAD, reference.fad, {"rho": 0.1, "rho_prime": 0.05, "alpha": 0.4, "lam": 0.6}),
}

if INTERPRETED:  # which takes a second a step: every kernel, and every way to fold and to project, but not every table
    METHODS = {name: METHODS[name] for name in ("base", "sam", "asam", "gsam", "gam")}

VARIANTS: dict[str, Method] = {
    "friendly": Method(gam_fast.FriendlySAM, reference.friendly_sam, {"rho": 0.1, "sigma": 0.8, "lam": 0.6}),
    "vasso": Method(gam_fast.VaSSO, reference.vasso, {"rho": 0.1, "theta": 0.4}),
    "momentum_sam": Method(gam_fast.MomentumSAM, reference.momentum_sam, {"rho": 0.1}),
    "previous_gradient": Method(gam_fast.PreviousGradientSAM, reference.previous_gradient_sam, {"rho": 0.1}),
    "look": Method(gam_fast.LookSAM, reference.look_sam, {"rho": 0.1, "k": 3, "alpha": 0.7}),
    "wsam": Method(gam_fast.WSAM, reference.wsam, {"rho": 0.1, "gamma": 0.6, "decouple": True}),
    "wsam_coupled": Method(gam_fast.WSAM, reference.wsam, {"rho": 0.1, "gamma": 0.6, "decouple": False}),
    "cr": Method(gam_fast.CRSAM, reference.cr_sam, {"rho": 0.1, "gamma": 0.2, "beta": 0.3}),
    "sagm": Method(gam_fast.SAGM, reference.sagm, {"rho": 0.1, "alpha": 0.02}),
    "usam": Method(gam_fast.USAM, reference.usam, {"rho": 0.1, "lam": 0.3}),
    "stable": Method(gam_fast.StableSAM, reference.stable_sam, {"rho": 0.1}),
}
"""Methods whose references have a ``state``, as most of them keep something from step to step. They share their engine
with those above, and are tested for what they have of their own."""

if INTERPRETED:  # a perturbation by a multiple of the gradient
    VARIANTS = {name: VARIANTS[name] for name in ("friendly", "sagm")}

ALL = METHODS | VARIANTS

RANDOM = Method(gam_fast.RandomSAM, reference.base, {"rho": 0.1, "seed": 3})
"""It is in no table: its trajectory is that of no loop."""

EXACT: dict[str, Method] = {
    "exact": Method(gam_fast.ExactGAM, reference.exact_gam, {"rho": 0.2, "alpha": 0.4}),
    "exact_sam": Method(gam_fast.ExactGAM, reference.exact_gam, {"rho": 0.2, "alpha": 0.4, "sam_rho": 0.1}),
}
"""A pass of second order: the engine differentiates the loss that a pass hands over (``turn.backward``)."""

MULTIPASS = [name for name, method in METHODS.items() if method.passes > 1]

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "sgd_nesterov": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "sgd_dampening_maximize": partial(torch.optim.SGD, lr=0.002, momentum=0.8, dampening=0.3, maximize=True),
    "adam_amsgrad": partial(torch.optim.Adam, lr=1e-2, amsgrad=True, weight_decay=1e-2, eps=1e-4),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, eps=1e-4),
    "adamw_maximize": partial(torch.optim.AdamW, lr=2e-3, eps=1e-4, maximize=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, alpha=0.9, eps=1e-4, momentum=0.5),
}
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def setting(
    method_name: str,
    base: Callable[..., torch.optim.Optimizer] = MOMENTUM,
    model_name: str = "mlp",
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[nn.Module, gam_fast.SharpnessAwareOptimizer, list[tuple[Tensor, Tensor]]]:
    """The model, an optimizer of the method over it, and batches."""
    method = ALL[method_name]
    model, batches = make(model_name, dtype)
    options = {"model": model, **method.hyper, **options}
    return model, method.optimizer(model.parameters(), base, **options), batches
