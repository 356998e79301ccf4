"""Show the effect of a radius that is too small or too large: accuracy and training loss of SAM and GAM on the digits.

python -m experiments.radius --json bench/results/radius_cpu.json --picture docs/radius.png
python -m experiments.radius --changes --json bench/results/radius_changes_cpu.json
python -m experiments.radius --text FILE --seeds 100,101 --json bench/results/radius_text_cpu.json

Only ``rho`` changes, from a tenth of a good value to eight times that; SGD stands for radius 0. With ``--changes``, SAM
is also trained for other lengths, with other batches (the learning rate follows the batch) and with a wider network, to
see whether the best radius moves. ``--text`` does so for the length of training on a text, by the task ``text`` of
:mod:`experiments.evidence` in fp32. Its loss is that of letters held out of the training set, not of the test set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import options
from bench.contenders import machine
from bench.report import Table, png, write_json

from . import evidence
from .picture import COLORS
from .runs import CONTENDERS, Trainer
from .tasks import Task, digits

RADII = (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
METHODS = ("SAM", "GAM")
CHANGED_RADII = RADII[1:6]
QUICK_STEPS = 2
LENGTHS = (500, 1500, 3000)
TEXT_RADII = (0.05, 0.1, 0.2)
COLUMNS = {"method": "", "rho": "rho", "accuracy": "test accuracy, %", "loss": "training loss"}


def found(task: Task, method: str, rho: float | None, seeds: Sequence[int]) -> dict[str, Any]:
    """Train with each seed; return accuracy and loss."""
    if rho is not None:
        task = replace(task, methods={method: {**task.methods[method], "rho": rho}}, own={})
    accuracy, loss = [], []
    for seed in seeds:
        trainer = Trainer(CONTENDERS[method], task, seed)
        for _ in range(task.epochs):
            trainer.epoch()
        accuracy.append(task.accuracy(trainer.model))
        loss.append(task.training_loss(trainer.model).value())
    return {"method": method, "rho": rho, "accuracy": accuracy, "loss": loss}


def found_on_text(data: Path, steps: int, rho: float | None, seeds: Sequence[int]) -> dict[str, Any]:
    """Train the GPT by SAM, or by AdamW alone; return the loss on letters that are held out, and that of training."""
    task = evidence.TASKS["text" if steps > QUICK_STEPS else "quick-text"]
    arm = evidence.Arm("", "AdamW") if rho is None else evidence.Arm("", "SAM", {"rho": rho})
    held, train = [], []
    for seed in seeds:
        planned = evidence.Planned(arm, steps, 0.0, seed, tune=True, unit="steps")
        settings = replace(evidence.settings_of(task, planned), bf16=False)
        figures, _ = evidence.train_on_text(task, settings, data, torch.device("cpu"), task.held)
        held.append(figures["test_loss"])
        train.append(figures["train_loss"])
    return {"task": f"{steps} steps", "method": arm.method, "rho": rho, "held_loss": held, "loss": train}


def means(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the means over seeds."""
    return {**row, **{name: statistics.mean(row[name]) for name in ("accuracy", "loss")}}


def changed(usual: Task) -> dict[str, Task]:
    """Return the task with one thing changed at a time."""
    tasks = {f"{epochs} epochs": replace(usual, epochs=epochs) for epochs in (10, 40)}
    for batch in (25, 200):
        rate = usual.hyper["lr"] * batch / usual.batch
        tasks[f"batch {batch}, lr {rate:g}"] = replace(usual, batch=batch, hyper={**usual.hyper, "lr": rate})
    return {**tasks, "4 times as wide": digits(width=64)}


def gains(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a row per task: figures of the base optimizer, then how much better SAM is with each radius."""
    title, figure, sign, digits = "digits, 30 % wrong labels: points above SGD", "accuracy", 1.0, 2
    columns = {"task": "", "accuracy": "SGD: test accuracy, %", "loss": "training loss"}
    if "held_loss" in rows[0]:
        title, figure, sign, digits = "a text by a small GPT: nats per letter below AdamW", "held_loss", -1.0, 3
        columns = {"task": "", "held_loss": "AdamW: held-out loss", "loss": "training loss"}
    shown = []
    for name in dict.fromkeys(row["task"] for row in rows):
        base, *own = [row for row in rows if row["task"] == name]
        cells = {"task": name, **{key: f"{statistics.mean(base[key]):.{digits}f}" for key in (figure, "loss")}}
        for row in own:
            key = f"rho {row['rho']:g}"
            columns[key] = key
            apart = [sign * (x - y) for x, y in zip(row[figure], base[figure], strict=True)]
            cells[key] = f"{statistics.mean(apart):+.{digits}f}"
        shown.append(cells)
    return Table(title, columns, shown)


def picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """Draw accuracy and training loss against the radius, one line per method and dots for its seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    labels = {"error": "test error, %", "loss": "training loss at the end"}
    rows = [{**row, "error": [100.0 - accuracy for accuracy in row["accuracy"]]} for row in rows]
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        base = next(row for row in rows if row["rho"] is None)
        axes.axhline(statistics.mean(base[key]), color=COLORS["base"], linestyle="--", label="SGD")
        for method in METHODS:
            own = [row for row in rows if row["method"] == method]
            radii = [row["rho"] for row in own]
            axes.plot(
                radii, [statistics.mean(row[key]) for row in own], color=COLORS[method], label=method, linewidth=2
            )
            for row in own:
                axes.plot([row["rho"]] * len(row[key]), row[key], ".", color=COLORS[method], alpha=0.6)
        axes.set(xscale="log", yscale="log" if key == "error" else "linear")
        axes.xaxis.set_major_locator(FixedLocator(sorted({row["rho"] for row in rows if row["rho"] is not None})[::2]))
        for axis in (axes.xaxis, axes.yaxis) if key == "error" else (axes.xaxis,):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
        if key == "error":
            axes.yaxis.set_major_locator(FixedLocator([5, 7, 10, 20, 50, 90]))
        axes.set_xlabel("rho", fontsize=11)
        axes.set_title(label, loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=10)
    return png(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=options.seeds, default="0,1,2", help="with commas (default: %(default)s)")
    parser.add_argument("--threads", type=options.positive, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--json", type=options.output, metavar="PATH", help="write the figures to PATH")
    parser.add_argument("--picture", type=options.output, metavar="PATH", help="draw them to PATH")
    parser.add_argument(
        "--read", type=Path, metavar="PATH", help="train nothing, show the figures of an earlier --json"
    )
    parser.add_argument("--changes", action="store_true", help="change length, batch and width, and not the method")
    parser.add_argument("--text", type=Path, metavar="PATH", help="change the length of training on this text")
    parser.add_argument("--quick", action="store_true", help="two radii, few examples, to check that it works")
    given = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    if given.read:
        figures = json.loads(given.read.read_text(encoding="utf-8"))
    elif given.text:
        torch.set_num_threads(given.threads)
        figures = {"benchmark": "radius", "quick": given.quick, **machine(), "seeds": given.seeds, "rows": rows}
        for steps in (QUICK_STEPS,) if given.quick else LENGTHS:
            for rho in (None, *TEXT_RADII):
                rows.append(found_on_text(given.text, steps, rho, given.seeds))
                print(rows[-1]["task"], rho, statistics.mean(rows[-1]["held_loss"]), file=sys.stderr)
            write_json(given.json, figures)
    else:
        torch.set_num_threads(given.threads)
        usual = digits()
        radii: Sequence[float] = CHANGED_RADII if given.changes else RADII
        tasks, methods = (changed(usual), METHODS[:1]) if given.changes else ({"": usual}, METHODS)
        if given.quick:
            tasks, radii = {name: task.quick(40) for name, task in tasks.items()}, radii[:2]
        figures = {"benchmark": "radius", "quick": given.quick, **machine(), "seeds": given.seeds, "rows": rows}
        for name, task in tasks.items():
            rows.append({"task": name, **found(task, "base", None, given.seeds)})
            for method in methods:
                for rho in radii:
                    rows.append({"task": name, **found(task, method, rho, given.seeds)})
                    print(name, method, rho, means(rows[-1])["accuracy"], file=sys.stderr)
            write_json(given.json, figures)
    rows = figures["rows"]
    if any(row.get("task") for row in rows):
        gains(rows).show()
    else:
        Table("digits, 30 % wrong labels", COLUMNS, [means(row) for row in rows]).show()
    if given.picture:
        given.picture.write_bytes(picture(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
