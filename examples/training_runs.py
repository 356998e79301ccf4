"""Shared by the examples that train: settings on a command line, the optimizer, the loop over epochs, checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import time
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


def device_of(name: str) -> torch.device:
    """Return the device that this process works on: of several GPUs, the one that torchrun gives it."""
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


@dataclass
class Curve:
    """The figures of a run, an entry for each epoch.

    ``train_loss`` is the mean over the batches of one process, each before any perturbation. ``seconds`` are of
    training alone.
    """

    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class EpochRun:
    """Training in epochs, on one process of several or on the only one. A subclass trains, tests and saves."""

    settings: Any
    rank: int

    def __init__(self) -> None:
        self.curve, self.epoch = Curve(), 0

    def train(self) -> float:
        """Train for one epoch, and return the mean loss."""
        raise NotImplementedError

    def test(self) -> tuple[float, float]:
        """Return the loss and the accuracy (in percent) on the images that are not trained on."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write all that the next epoch depends on; every process calls it."""
        raise NotImplementedError

    def go_on(self, checkpoint: Path | None = None) -> Curve:
        """Train all epochs that are left; write a checkpoint after each."""
        while self.epoch < self.settings.epochs:
            start = time.perf_counter()
            loss = self.train()  # a number, for which the device has done all of the epoch
            seconds = time.perf_counter() - start
            test_loss, accuracy = self.test()
            self.epoch += 1
            for column, value in zip(fields(self.curve), (loss, test_loss, accuracy, seconds), strict=True):
                getattr(self.curve, column.name).append(value)
            if self.rank == 0:
                print(f"epoch {self.epoch:3d}  loss {loss:.4f}  test accuracy {accuracy:.2f} %  {seconds:.1f} s")
            if checkpoint is not None:
                self.save(checkpoint)
        return self.curve


def carry_out(run: Any, arguments: argparse.Namespace) -> Any:
    """Go on from the checkpoint, if there is one, to the end. Write the figures, and return them."""
    if arguments.checkpoint is not None and arguments.checkpoint.exists():
        run.load(arguments.checkpoint)
    curve = run.go_on(arguments.checkpoint)
    if arguments.json is not None and getattr(run, "rank", 0) == 0:
        found = {**machine(run.device), "settings": asdict(run.settings), **asdict(curve)}
        arguments.json.write_text(json.dumps(found, indent=1))
    return curve
