"""Shared by cifar.py, imagenet.py and charlm.py: settings on a command line, the optimizer, checkpoints."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import gam_fast


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The method, and how it is used.

    Attributes:
        method: a class of gam_fast; ``"SGD"`` and ``"AdamW"`` are the base optimizer alone.
        hyper: hyper-parameters of the method that are not its defaults.
        late: the share of the run, at its end, in which the method works, after the base optimizer alone.
    """

    method: str = "GAM"
    hyper: Mapping[str, float] = field(default_factory=dict)
    interval: int = 1
    ascent_share: float = 1.0
    late: float = 1.0
    bf16: bool = False
    compile: bool = False
    backend: str = "auto"
    seed: int = 0


AnySettings = TypeVar("AnySettings", bound=Settings)

HELP = {
    "late": "share of the run, at its end, in which the method works; the base optimizer alone before",
    "ascent_share": "share of the batch that the ascent passes see",
    "interval": "take the whole method at every so manyth step, the base optimizer alone between",
}


def parse(
    argv: Sequence[str] | None,
    presets: Mapping[str, AnySettings],
    bases: Iterable[str],
    more: Mapping[str, Mapping[str, Any]],
    choices: Mapping[str, Iterable[str]],
    helps: Mapping[str, str],
) -> tuple[argparse.Namespace, AnySettings]:
    """Return the arguments, and the settings: those of the preset, with what the command line says otherwise.

    Args:
        bases: the names of base optimizers, which stand for them alone as a method.
        more: arguments beside the settings, by their names.
        choices: what a setting may be.
        helps: about a setting.
    """
    parser = argparse.ArgumentParser()
    for name, keywords in more.items():
        parser.add_argument(name, **keywords)
    parser.add_argument("--preset", choices=presets, default=next(iter(presets)), help="(default: %(default)s)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="hyper-parameters: rho=0.1 gamma=0.05"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="written now and then, and gone on from")
    parser.add_argument("--json", type=Path, metavar="FILE", help="settings and figures, at the end")
    choices = {**choices, "method": [*bases, *(name for name in gam_fast.recipes.RECIPES if name != "Base")]}
    columns = [column for column in fields(next(iter(presets.values()))) if column.name != "hyper"]
    for column in columns:
        name = "--" + column.name.replace("_", "-")
        about = {**HELP, **helps}.get(column.name)
        if column.type == "bool":
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=about)
        else:
            kind = {"int": int, "float": float, "str": str}[str(column.type)]
            parser.add_argument(name, type=kind, choices=choices.get(column.name), help=about)
    arguments = parser.parse_args(argv)
    settings = presets[arguments.preset]
    given = {column.name: getattr(arguments, column.name) for column in columns}
    given = {name: value for name, value in given.items() if value is not None}
    other = given.get("method", settings.method) != settings.method  # whose hyper-parameters are not the preset's
    hyper = {} if other else dict(settings.hyper)
    for entry in arguments.set:
        name, _, value = entry.partition("=")
        try:
            hyper[name] = float(value)
        except ValueError:
            parser.error(f"--set takes NAME=VALUE with a number, got {entry!r}")
    return arguments, replace(settings, hyper=hyper, **given)


def wrap(
    settings: Settings,
    model: nn.Module,
    params: Iterable[Any],
    base: type[torch.optim.Optimizer],
    total_steps: int,
    **options: Any,
) -> gam_fast.SharpnessAwareOptimizer:
    """Return the method around a base optimizer, for a run of so many steps."""
    alone = settings.method == base.__name__
    method: type[gam_fast.SharpnessAwareOptimizer] = getattr(gam_fast, "Base" if alone else settings.method)
    if not alone:
        options["interval"] = settings.interval
        if settings.ascent_share < 1.0:
            options["ascent_share"] = settings.ascent_share
        if settings.late < 1.0:
            options["active"] = gam_fast.active.Late(settings.late, total_steps=total_steps)
    options |= settings.hyper
    return method(params, base, model=model, backend=settings.backend, **options)


def save(path: Path, settings: Settings, state: dict[str, Any]) -> None:
    """Write a checkpoint; a run that is killed meanwhile leaves the one before it whole."""
    partial = path.with_suffix(".partial")
    torch.save({"settings": asdict(settings), **state}, partial)
    partial.replace(path)


def load(path: Path, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Read what :func:`save` wrote.

    Raises:
        SystemExit: it is of a run with other settings.
    """
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    mine = asdict(settings)
    if others := [name for name, value in state["settings"].items() if value != mine[name]]:
        raise SystemExit(f"{path} is of a run with other settings: {', '.join(others)}. Name another file")
    return state


def machine(device: torch.device) -> dict[str, str]:
    """Return what the figures of a run were made with."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": card, "torch": torch.__version__, "gam_fast": gam_fast.__version__}
