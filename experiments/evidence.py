"""Measure the gain of sharpness-aware methods at the size of a real task, at equal epochs and at equal time.

python -m experiments.evidence --data cifar10.npz --results bench/results/evidence_cpu.json

Each run is an arm (a method with its settings), a length of training, a share of wrong labels and a seed. Finished runs
are in the results file and are not repeated, so a stopped run can continue, and another machine may add seeds.
``--seconds`` stops after the last run that fits. ``--tune`` runs the settings that arms were chosen from, on their own
seeds and images: a part of the training set, never a test image.

Task ``cpu`` has 10,000 images, which its small network cannot memorise in so short a training; ``few`` has 2,000, which
it can. Networks and training are those of ``examples/cifar.py``. The plain base optimizer also trains for twice and
four times as long, the cost of SAM and GAM, so that rows of equal time can be compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gam_fast
from bench import options
from bench.report import Table, write_json
from gam_fast import flatness

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "examples") not in sys.path:
    sys.path.append(str(ROOT / "examples"))

import cifar  # noqa: E402
import cifar_images  # noqa: E402
import training_runs  # noqa: E402


@dataclass(frozen=True)
class Arm:
    """A method with its settings.

    Attributes:
        times: length of its training, relative to the others.
    """

    name: str
    method: str
    hyper: Mapping[str, float] = field(default_factory=dict)
    late: float = 1.0
    share: float = 1.0
    interval: int = 1
    times: int = 1

    @property
    def gradients(self) -> float:
        """The cost: gradients of the run, relative to the base optimizer's in a run of normal length."""
        passes: int = getattr(gam_fast, "Base" if self.method == "SGD" else self.method).recipe.passes
        whole = (passes - 1) * self.share + 1
        return self.times * (1 + self.late * (whole - 1) / self.interval)


GAM = {"rho": 0.1, "rho_prime": 0.02, "alpha": 0.3, "beta": 0.3, "gamma": 0.03}
SAM = {"rho": 0.1}

ARMS = (
    Arm("SGD", "SGD"),
    Arm("SGD, twice as long", "SGD", times=2),
    Arm("SGD, 4 times as long", "SGD", times=4),
    Arm("SAM", "SAM", SAM),
    Arm("SAM, last .3", "SAM", SAM, late=0.3),
    Arm("SAM, last .5", "SAM", SAM, late=0.5),
    Arm("MomentumSAM", "MomentumSAM", {"rho": 0.3}),
    Arm("GAM", "GAM", GAM),
    Arm("GAM, last .3", "GAM", GAM, late=0.3),
    Arm("GAM, last .5", "GAM", GAM, late=0.5),
    Arm("GAM, share .25", "GAM", GAM, share=0.25),
    Arm("GAM, share .5, every 2nd step", "GAM", GAM | {"rho": 0.15, "alpha": 0.15}, share=0.5, interval=2),
)

TUNED = (
    *(Arm(f"SAM, rho {rho}", "SAM", {"rho": rho}) for rho in (0.02, 0.05, 0.1, 0.2)),
    *(Arm(f"GAM, rho {rho}", "GAM", GAM | {"rho": rho}) for rho in (0.02, 0.05, 0.1, 0.2)),
    *(Arm(f"MomentumSAM, rho {rho}", "MomentumSAM", {"rho": rho}) for rho in (0.1, 0.3, 1.0)),
)


@dataclass(frozen=True)
class Task:
    """The settings that all arms share.

    Attributes:
        settings: settings of :mod:`cifar`, without those of an arm.
        lengths: numbers of epochs.
        held: number of training images that are held out to choose settings.
        measured: number of images on which flatness is measured.
    """

    settings: cifar.Settings
    lengths: tuple[int, ...]
    wrong_labels: tuple[float, ...] = (0.0, 0.2)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuned_on: tuple[int, ...] = (100, 101)
    held: int = 5000
    measured: int = 2000


SMALL = cifar.Settings(network="small", train_images=10_000, lr=0.05, smoothing=0.0, bf16=True)

TASKS: Mapping[str, Task] = {
    "cpu": Task(SMALL, (10, 30), measured=128),
    "few": Task(replace(SMALL, train_images=2_000), (60, 30, 100), wrong_labels=(0.2, 0.0), measured=128),
    "gpu": Task(cifar.Settings(network="resnet18", smoothing=0.0, bf16=True), (10, 30, 100)),
    "quick": Task(
        replace(SMALL, train_images=64, batch=32),
        (1,),
        wrong_labels=(0.2,),
        seeds=(0,),
        tuned_on=(100,),
        held=64,
        measured=8,
    ),
}


@dataclass(frozen=True)
class Planned:
    """A planned run. A finished run with the same key is not repeated."""

    arm: Arm
    epochs: int
    wrong_labels: float
    seed: int
    tune: bool = False

    @property
    def key(self) -> str:
        """The key of the run in the results."""
        kind = "tune" if self.tune else "test"
        return f"{kind}, {self.arm.name}, {self.epochs} epochs, wrong {self.wrong_labels}, seed {self.seed}"


def plan(task: Task, *, tune: bool = False) -> Iterator[Planned]:
    """Yield the runs: all arms of a seed before the next seed.

    Settings are chosen with the task's first length and first share of wrong labels.
    """
    if tune:
        for seed in task.tuned_on:
            for arm in (ARMS[0], *TUNED):
                yield Planned(arm, task.lengths[0], task.wrong_labels[0], seed, tune=True)
        return
    for epochs in task.lengths:
        for wrong in task.wrong_labels:
            for seed in task.seeds:
                for arm in ARMS:
                    yield Planned(arm, epochs, wrong, seed)


def settings_of(task: Task, planned: Planned) -> cifar.Settings:
    """Return the settings of a run for examples/cifar.py."""
    arm = planned.arm
    return replace(
        task.settings,
        method=arm.method,
        hyper=dict(arm.hyper),
        late=arm.late,
        ascent_share=arm.share,
        interval=arm.interval,
        epochs=planned.epochs * arm.times,
        wrong_labels=planned.wrong_labels,
        validation=task.held if planned.tune else 0,
        seed=planned.seed,
    )


def run(task: Task, planned: Planned, data: Path, device: torch.device) -> dict[str, Any]:
    """Train, and measure the result."""
    training = cifar.Run(settings_of(task, planned), data, device)
    start, losses = time.perf_counter(), []
    while training.epoch < training.settings.epochs:
        losses.append(training.train())
        training.epoch += 1
    seconds = time.perf_counter() - start
    test_loss, test_accuracy = training.test()  # only once, because it takes longer than training on few images
    found = {
        "arm": planned.arm.name,
        "epochs": planned.epochs,
        "wrong_labels": planned.wrong_labels,
        "seed": planned.seed,
        "tune": planned.tune,
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        "train_loss": losses[-1],
        "seconds": seconds,
        "settings": asdict(training.settings),
        **training_runs.machine(device),
        "commit": commit(),
    }
    if not planned.tune:
        images = training.train_set[slice(0, task.measured)]
        pixels = cifar_images.normalised(images.pixels)
        batches = list(zip(pixels.split(500), images.labels.split(500), strict=True))
        loss = flatness.Loss(training.plain, nn.CrossEntropyLoss(), batches)
        flat = flatness.measure(loss, 0.05, restarts=1, max_iterations=10, trace_samples=10)
        assert flat.eigenvalues is not None
        assert flat.trace is not None
        found |= {
            "lambda_max": flat.eigenvalues.values[0],
            "trace": flat.trace.value,
            "r1": flat.first_order[0].value,
        }
    return found


def commit() -> str:
    """Return the commit of this checkout, or an empty string."""
    asked = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean ± standard deviation as text; for one value, the value alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def tables(runs: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return a table for each length and share of wrong labels, after those of the choice of settings."""
    columns = {
        "arm": "",
        "seeds": "seeds",
        "gradients": "gradients ÷ SGD",
        "test_accuracy": "test accuracy, %",
        "test_loss": "test loss",
        "train_loss": "training loss",
        "lambda_max": "λmax",
        "trace": "trace",
        "r1": "R1",
        "time": "time ÷ SGD",
    }
    result = []
    kinds = sorted({(not run["tune"], run["epochs"], run["wrong_labels"]) for run in runs.values()})
    for tested, epochs, wrong in kinds:
        mine = [r for r in runs.values() if (not r["tune"], r["epochs"], r["wrong_labels"]) == (tested, epochs, wrong)]
        base = [found["seconds"] for found in mine if found["arm"] == ARMS[0].name]
        rows = []
        for arm in ARMS if tested else (ARMS[0], *TUNED):
            of_arm = [found for found in mine if found["arm"] == arm.name]
            if not of_arm:
                continue
            seconds = statistics.median(found["seconds"] for found in of_arm)
            digits = {"test_accuracy": 2, "test_loss": 3, "train_loss": 3, "lambda_max": 1, "trace": 0, "r1": 3}
            rows.append(
                {
                    "arm": arm.name,
                    "seeds": len(of_arm),
                    "gradients": f"{arm.gradients:g}",
                    **{
                        name: spread([found[name] for found in of_arm], n)
                        for name, n in digits.items()
                        if name in columns and name in of_arm[0]
                    },
                    "time": f"{seconds / statistics.median(base):.2f}" if base else "",
                }
            )
        labels = f"{wrong:.0%} wrong labels" if wrong else "right labels"
        chosen = "" if tested else ", images held out of the training set"
        shown = {name: about for name, about in columns.items() if name in rows[0]}
        result.append(Table(f"{epochs} epochs, {labels}{chosen}", shown, rows))
    return result


def stored(results: Path) -> dict[str, Any]:
    """Return the runs in the results file."""
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=Path, required=True, help="as for examples/cifar.py")
    found.add_argument("--task", choices=TASKS, default="cpu", help="(default: %(default)s)")
    found.add_argument("--results", type=options.output, required=True, metavar="PATH", help="file to read and extend")
    found.add_argument("--tune", action="store_true", help="run the candidates for the choice of settings")
    found.add_argument("--seed", type=int, help="only runs of this seed, for parallel processes")
    found.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so many seconds")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--threads", type=options.positive, help="CPU threads of torch")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and print the tables."""
    given = parser().parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    task, start = TASKS[given.task], time.monotonic()
    runs = stored(given.results)
    for planned in plan(task, tune=given.tune):
        if planned.key in runs or given.seed not in (None, planned.seed):
            continue
        if time.monotonic() - start > given.seconds:
            break
        print(planned.key, file=sys.stderr)
        found = run(task, planned, given.data, torch.device(given.device))
        runs = stored(given.results) | {planned.key: found}  # includes runs that other processes have added meanwhile
        write_json(given.results, runs)
    for table in tables(runs):
        print(f"### {table.title}\n\n{table.markdown()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
