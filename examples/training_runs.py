"""Shared code of the training examples: command-line settings, optimizer, epochs, checkpoints."""

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
    """The method and its settings.

    Attributes:
        method: a class of gam_fast; ``"SGD"`` and ``"AdamW"`` mean the base optimizer alone.
        hyper: hyper-parameters of the method that differ from its defaults.
        late: the share of the run, at its end, that uses the method; before, the base optimizer runs alone.
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
    "late": "share of the run, at its end, that uses the method; before, the base optimizer alone",
    "ascent_share": "share of the batch that the ascent passes see",
    "interval": "use the method in every N-th step, and the base optimizer alone in between",
}


def parse(
    argv: Sequence[str] | None,
    presets: Mapping[str, AnySettings],
    bases: Iterable[str],
    more: Mapping[str, Mapping[str, Any]],
    choices: Mapping[str, Iterable[str]],
    helps: Mapping[str, str],
) -> tuple[argparse.Namespace, AnySettings]:
    """Return the arguments, and the settings: those of the preset, with the changes of the command line.

    Args:
        argv: the command line.
        presets: settings by name.
        bases: base optimizers that may be named as a method, to run alone.
        more: further arguments, by name.
        choices: allowed values of settings.
        helps: help texts of settings.
    """
    parser = argparse.ArgumentParser()
    for name, keywords in more.items():
        parser.add_argument(name, **keywords)
    parser.add_argument("--preset", choices=presets, default=next(iter(presets)), help="(default: %(default)s)")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="hyper-parameters: rho=0.1 gamma=0.05"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="write checkpoints here, and continue from one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings and figures here, at the end")
    methods = [name for name in gam_fast.recipes.RECIPES if name not in ("Base", "FedLESAM")]  # this needs two models
    choices = {**choices, "method": [*bases, *methods]}
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
    other = given.get("method", settings.method) != settings.method  # then the preset's hyper-parameters do not apply
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
    """Return the method around a base optimizer, for a run of ``steps`` steps."""
    alone = settings.method == base.__name__
    method: type[gam_fast.SharpnessAwareOptimizer] = getattr(gam_fast, "Base" if alone else settings.method)
    if not alone:
        options["interval"] = settings.interval
        if settings.ascent_share < 1.0:
            options["ascent_share"] = settings.ascent_share
        if settings.late != 1.0:
            options["active"] = gam_fast.active.Late(settings.late, total_steps=total_steps)
    options |= settings.hyper
    return method(params, base, model=model, backend=settings.backend, **options)


def save(path: Path, settings: Settings, state: dict[str, Any]) -> None:
    """Write a checkpoint. If the run is killed meanwhile, the previous checkpoint stays intact."""
    partial = path.with_suffix(".partial")
    torch.save({"settings": asdict(settings), **state}, partial)
    partial.replace(path)


def load(path: Path, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Read a checkpoint of :func:`save`.

    Raises:
        SystemExit: the checkpoint belongs to a run with other settings.
    """
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    mine = asdict(settings)
    if others := [name for name, value in state["settings"].items() if value != mine[name]]:
        raise SystemExit(f"{path} is of a run with other settings: {', '.join(others)}. Name another file")
    return state


def machine(device: torch.device) -> dict[str, str]:
    """Return the software and machine of a run."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": card, "torch": torch.__version__, "gam_fast": gam_fast.__version__}


def device_of(name: str) -> torch.device:
    """Return the device of this process; with several GPUs, the one that torchrun assigns."""
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


@dataclass
class Curve:
    """The figures of a run, with one entry per epoch.

    ``train_loss`` is the mean over the batches of one process, before any perturbation. ``seconds`` is the time of
    training alone.
    """

    train_loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class EpochRun:
    """Training in epochs, on one of several processes or on the only one. A subclass trains, tests and saves."""

    settings: Any
    rank: int

    def __init__(self) -> None:
        self.curve, self.epoch = Curve(), 0

    def train(self) -> float:
        """Train for one epoch, and return the mean loss."""
        raise NotImplementedError

    def test(self) -> tuple[float, float]:
        """Return the loss and the accuracy (in percent) on the test images."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write everything that the next epoch depends on; every process calls this."""
        raise NotImplementedError

    def go_on(self, checkpoint: Path | None = None) -> Curve:
        """Train all remaining epochs; write a checkpoint after each."""
        while self.epoch < self.settings.epochs:
            start = time.perf_counter()
            loss = self.train()  # reading this number waits until the device has finished the epoch
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
    """Continue from the checkpoint, if there is one, to the end. Write the figures, and return them."""
    if arguments.checkpoint is not None and arguments.checkpoint.exists():
        run.load(arguments.checkpoint)
    curve = run.go_on(arguments.checkpoint)
    if arguments.json is not None and getattr(run, "rank", 0) == 0:
        found = {**machine(run.device), "settings": asdict(run.settings), **asdict(curve)}
        arguments.json.write_text(json.dumps(found, indent=1))
    return curve
