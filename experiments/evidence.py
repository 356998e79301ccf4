"""Measure the gain of sharpness-aware methods at the size of a real task, at equal length and at equal time.

python -m experiments.evidence --data cifar10.npz --results bench/results/evidence_cpu.json

Each run is an arm (a method with its settings), a length of training, a share of wrong labels and a seed. Finished runs
are in the results file and are not repeated, so a stopped run can continue, and another machine may add seeds.
``--seconds`` stops after the last run that fits. ``--tune`` runs the settings that arms were chosen from, on their own
seeds and images: a part of the training set, never a test image.

Task ``cpu`` has 10,000 images, which its small network cannot memorise in so short a training; ``few`` has 2,000, which
it can. Networks and training are those of ``examples/cifar.py``. Task ``text`` trains the small GPT of
``examples/charlm.py`` by AdamW on 20,000 letters. The plain base optimizer also trains for twice and four times as
long, the cost of SAM and GAM, so that rows of equal time can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import gam_fast
from bench import options
from bench.report import Table, write_json
from gam_fast import flatness

from .picture import Point, against_cost

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "examples") not in sys.path:
    sys.path.append(str(ROOT / "examples"))

import charlm  # noqa: E402
import cifar  # noqa: E402
import cifar_images  # noqa: E402
import training_runs  # noqa: E402

BASES = ("SGD", "AdamW")


@dataclass(frozen=True)
class Arm:
    """A method with its settings.

    Attributes:
        times: length of its training, relative to the others.
        fp32: train without autocast.
    """

    name: str
    method: str
    hyper: Mapping[str, float] = field(default_factory=dict)
    late: float = 1.0
    share: float = 1.0
    interval: int = 1
    times: int = 1
    fp32: bool = False

    @property
    def in_fp32(self) -> Arm:
        """The same without autocast, under a name of its own."""
        return replace(self, name=f"{self.name}, fp32", fp32=True)

    @property
    def gradients(self) -> float:
        """The cost: gradients of the run, relative to the base optimizer's in a run of normal length."""
        passes: int = getattr(gam_fast, "Base" if self.method in BASES else self.method).recipe.passes
        whole = (passes - 1) * self.share + 1
        return self.times * (1 + self.late * (whole - 1) / self.interval)


GAM = {"rho": 0.1, "rho_prime": 0.02, "alpha": 0.3, "beta": 0.3, "gamma": 0.03}
SAM = {"rho": 0.1}


def arms_around(base: str, momentum_rho: float) -> tuple[Arm, ...]:
    """Return what is compared around a base optimizer, and it alone first; the radius of MomentumSAM is given."""
    return (
        Arm(base, base),
        Arm(f"{base}, twice as long", base, times=2),
        Arm(f"{base}, 4 times as long", base, times=4),
        Arm("SAM", "SAM", SAM),
        Arm("SAM, twice as long", "SAM", SAM, times=2),
        Arm("SAM, last .3", "SAM", SAM, late=0.3),
        Arm("SAM, last .5", "SAM", SAM, late=0.5),
        Arm("MomentumSAM", "MomentumSAM", {"rho": momentum_rho}),
        Arm("GAM", "GAM", GAM),
        Arm("GAM, last .3", "GAM", GAM, late=0.3),
        Arm("GAM, last .5", "GAM", GAM, late=0.5),
        Arm("GAM, share .25", "GAM", GAM, share=0.25),
        Arm("GAM, share .5, every 2nd step", "GAM", GAM | {"rho": 0.15, "alpha": 0.15}, share=0.5, interval=2),
    )


ARMS = arms_around("SGD", 0.3)
OF_TEXT = arms_around("AdamW", 1.0)

TUNED = (
    *(Arm(f"SAM, rho {rho}", "SAM", {"rho": rho}) for rho in (0.02, 0.05, 0.1, 0.2)),
    *(Arm(f"GAM, rho {rho}", "GAM", GAM | {"rho": rho}) for rho in (0.02, 0.05, 0.1, 0.2)),
    *(Arm(f"MomentumSAM, rho {rho}", "MomentumSAM", {"rho": rho}) for rho in (0.1, 0.3, 1.0)),
)


@dataclass(frozen=True)
class Task:
    """The settings that all arms share.

    Attributes:
        settings: settings of :mod:`cifar` or :mod:`charlm`, without those of an arm.
        lengths: numbers of epochs; for a text, of steps.
        held: number of images or letters that are held out of the training set to choose settings.
        measured: number of images or pieces of text on which flatness is measured.
        arms: the arms to compare, the base optimizer first.
    """

    settings: cifar.Settings | charlm.Settings
    lengths: tuple[int, ...]
    wrong_labels: tuple[float, ...] = (0.0, 0.2)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuned_on: tuple[int, ...] = (100, 101)
    held: int = 5000
    measured: int = 2000
    arms: tuple[Arm, ...] = ARMS

    @property
    def is_text(self) -> bool:
        """True if the task is a text."""
        return isinstance(self.settings, charlm.Settings)


LETTERS = charlm.Settings(
    layers=2,
    heads=4,
    width=64,
    context=64,
    dropout=0.0,
    batch=16,
    lr=3e-3,
    bf16=True,
    train_letters=20_000,
)
SMALL = cifar.Settings(network="small", train_images=10_000, lr=0.05, smoothing=0.0, bf16=True)

TASKS: dict[str, Task] = {
    "cpu": Task(SMALL, (10, 30), measured=128),
    "few": Task(replace(SMALL, train_images=2_000), (60, 30, 100), wrong_labels=(0.2, 0.0), measured=128),
    "text": Task(LETTERS, (1500, 500), wrong_labels=(0.0,), held=20_000, measured=64, arms=OF_TEXT),
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
    "quick-text": Task(
        replace(LETTERS, context=8, steps=2, train_letters=100),
        (2,),
        wrong_labels=(0.0,),
        seeds=(0,),
        tuned_on=(100,),
        held=32,
        measured=2,
        arms=OF_TEXT,
    ),
}


@dataclass(frozen=True)
class Planned:
    """A planned run. A finished run with the same key is not repeated."""

    arm: Arm
    length: int
    wrong_labels: float
    seed: int
    tune: bool = False
    unit: str = "epochs"

    @property
    def key(self) -> str:
        """The key of the run in the results."""
        kind = "tune" if self.tune else "test"
        return f"{kind}, {self.arm.name}, {self.length} {self.unit}, wrong {self.wrong_labels}, seed {self.seed}"


def plan(task: Task, *, tune: bool = False) -> Iterator[Planned]:
    """Yield the runs: all arms of a seed before the next seed.

    Settings are chosen with the task's first length and first share of wrong labels.
    """
    unit = "steps" if task.is_text else "epochs"
    if tune:
        for seed in task.tuned_on:
            for arm in (task.arms[0], *TUNED):
                yield Planned(arm, task.lengths[0], task.wrong_labels[0], seed, tune=True, unit=unit)
        return
    for length in task.lengths:
        for wrong in task.wrong_labels:
            for seed in task.seeds:
                for arm in task.arms:
                    yield Planned(arm, length, wrong, seed, unit=unit)


def settings_of(task: Task, planned: Planned) -> Any:
    """Return the settings of a run for the example."""
    arm = planned.arm
    settings = replace(
        task.settings,
        method=arm.method,
        hyper=dict(arm.hyper),
        late=arm.late,
        ascent_share=arm.share,
        interval=arm.interval,
        seed=planned.seed,
        bf16=task.settings.bf16 and not arm.fp32,
    )
    length = planned.length * arm.times
    if isinstance(settings, charlm.Settings):
        return replace(settings, steps=length)
    held = task.held if planned.tune else 0
    return replace(settings, epochs=length, wrong_labels=planned.wrong_labels, validation=held)


def train_on_images(
    task: Task, settings: cifar.Settings, data: Path, device: torch.device
) -> tuple[dict[str, float], flatness.Loss]:
    """Train a network of examples/cifar.py. Return the figures, and the loss on some images."""
    training = cifar.Run(settings, data, device)
    start, loss = time.perf_counter(), math.nan
    while training.epoch < settings.epochs:
        loss = training.train()
        training.epoch += 1
    seconds = time.perf_counter() - start
    test_loss, test_accuracy = training.test()  # only once: it takes longer than training on few images
    images = training.train_set[slice(0, task.measured)]
    pixels = cifar_images.normalised(images.pixels)
    batches = list(zip(pixels.split(500), images.labels.split(500), strict=True))
    found = {"test_accuracy": test_accuracy, "test_loss": test_loss, "train_loss": loss, "seconds": seconds}
    return found, flatness.Loss(training.plain, nn.CrossEntropyLoss(), batches)


def of_letters(scores: Tensor, letters: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats per letter."""
    return functional.cross_entropy(scores.flatten(0, 1), letters.flatten())


def train_on_text(
    task: Task, settings: charlm.Settings, data: Path, device: torch.device, held: int
) -> tuple[dict[str, float], flatness.Loss]:
    """Train the GPT of examples/charlm.py. Return the figures, and the loss on some pieces of the text."""
    text = charlm.Text(data, device, settings.train_letters, held)
    training = charlm.Run(settings, text, device)
    start, loss = time.perf_counter(), math.nan
    while training.step < settings.steps:
        loss = training.train(min(100, settings.steps - training.step))
    seconds = time.perf_counter() - start
    found = {"test_loss": training.test(), "train_loss": loss, "seconds": seconds}
    count, length = task.measured, settings.context
    x, y = (text.train[shift : shift + count * length].view(count, length) for shift in (0, 1))
    return found, flatness.Loss(training.model, of_letters, [(x, y)])


def run(task: Task, planned: Planned, data: Path, device: torch.device) -> dict[str, Any]:
    """Train, and measure the result."""
    settings = settings_of(task, planned)
    if task.is_text:
        figures, loss = train_on_text(task, settings, data, device, task.held if planned.tune else 0)
    else:
        figures, loss = train_on_images(task, settings, data, device)
    found = {
        "arm": planned.arm.name,
        planned.unit: planned.length,
        "wrong_labels": planned.wrong_labels,
        "seed": planned.seed,
        "tune": planned.tune,
        **figures,
        "settings": asdict(settings),
        **training_runs.machine(device),
        "commit": commit(),
    }
    if not planned.tune:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention are differentiated once
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
    base_name = "AdamW" if any("steps" in run for run in runs.values()) else "SGD"
    arms = OF_TEXT if base_name == "AdamW" else ARMS
    columns = {
        "arm": "",
        "seeds": "seeds",
        "gradients": f"gradients ÷ {base_name}",
        "test_accuracy": "test accuracy, %",
        "test_loss": "test loss",
        "train_loss": "training loss",
        "lambda_max": "λmax",
        "trace": "trace",
        "r1": "R1",
        "time": f"time ÷ {base_name}",
    }
    unit = "steps" if base_name == "AdamW" else "epochs"
    result = []
    kinds = sorted({(not run["tune"], run[unit], run["wrong_labels"]) for run in runs.values()})
    for tested, length, wrong in kinds:
        mine = [r for r in runs.values() if (not r["tune"], r[unit], r["wrong_labels"]) == (tested, length, wrong)]
        rows = []
        shown = arms if tested else (arms[0], *TUNED)
        for arm in (*shown, *(arm.in_fp32 for arm in shown)):
            of_arm = [found for found in mine if found["arm"] == arm.name]
            if not of_arm:
                continue
            seconds = statistics.median(found["seconds"] for found in of_arm)
            base_arm = arms[0].in_fp32 if arm.fp32 else arms[0]
            base = [found["seconds"] for found in mine if found["arm"] == base_arm.name]
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
        labels = "" if unit == "steps" else f", {wrong:.0%} wrong labels" if wrong else ", right labels"
        chosen = "" if tested else ", held out of what is trained on"
        present = {name: about for name, about in columns.items() if name in rows[0]}
        result.append(Table(f"{length} {unit}{labels}{chosen}", present, rows))
    return result


def gains(task: Task, runs: Mapping[str, Mapping[str, Any]], length: int, wrong_labels: float) -> list[Point]:
    """Return the gain in test accuracy of each arm over the base optimizer with the same seed, with standard errors.

    For a text, it is the decrease of the test loss. Differences are per seed, because seeds differ by more than methods
    do.
    """
    unit, figure, sign = ("steps", "test_loss", -1.0) if task.is_text else ("epochs", "test_accuracy", 1.0)
    figures: dict[str, dict[int, float]] = {}
    for run in runs.values():
        if (run["tune"], run[unit], run["wrong_labels"]) == (False, length, wrong_labels):
            figures.setdefault(run["arm"], {})[run["seed"]] = sign * run[figure]
    found = []
    for arm in (*task.arms, *(arm.in_fp32 for arm in task.arms)):
        base_arm = task.arms[0].in_fp32 if arm.fp32 else task.arms[0]
        own, base = figures.get(arm.name, {}), figures.get(base_arm.name, {})
        apart = [own[seed] - base[seed] for seed in own if seed in base]
        if apart:
            error = statistics.stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else None
            method = "base" if arm.method in BASES else arm.method
            found.append(Point(arm.name, method, arm.gradients, statistics.mean(apart), error))
    return found


def stored(results: Path) -> dict[str, Any]:
    """Return the runs in the results file."""
    return json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=Path, required=True, help="as for examples/cifar.py, or a text")
    found.add_argument("--task", choices=TASKS, default="cpu", help="(default: %(default)s)")
    found.add_argument("--results", type=options.output, required=True, metavar="PATH", help="file to read and extend")
    found.add_argument("--tune", action="store_true", help="run the candidates for the choice of settings")
    arms = sorted({arm.name for arm in (*ARMS, *OF_TEXT, *TUNED)})
    found.add_argument("--arms", nargs="+", choices=arms, metavar="ARM", help="only these arms: " + "; ".join(arms))
    found.add_argument("--fp32", action="store_true", help="train without autocast; the arms are reported apart")
    found.add_argument("--seed", type=int, help="only runs of this seed, for parallel processes")
    found.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so many seconds")
    drawn = "draw gain against gradients, for the first length and share of wrong labels, to PATH"
    found.add_argument("--picture", type=options.output, metavar="PATH", help=drawn)
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
        if given.seed not in (None, planned.seed) or (given.arms and planned.arm.name not in given.arms):
            continue
        if given.fp32:
            planned = replace(planned, arm=planned.arm.in_fp32)
        if planned.key in runs:
            continue
        if time.monotonic() - start > given.seconds:
            break
        print(planned.key, file=sys.stderr)
        found = run(task, planned, given.data, torch.device(given.device))
        runs = stored(given.results) | {planned.key: found}  # includes runs that other processes have added meanwhile
        write_json(given.results, runs)
    for table in tables(runs):
        print(f"### {table.title}\n\n{table.markdown()}\n")
    if given.picture:
        length, wrong, base = task.lengths[0], task.wrong_labels[0], task.arms[0].name
        if isinstance(task.settings, charlm.Settings):
            title = f"{task.settings.train_letters:,} letters, {length:,} steps"
            gain = f"test loss in nats per letter, below {base}"
        else:
            quality = f"{100 * wrong:g} % wrong labels" if wrong else "right labels"
            title = f"{task.settings.train_images:,} images, {length} epochs, {quality}"
            gain = f"test accuracy, points above {base}"
        labels = f"gradients ÷ those of {base}", gain
        given.picture.write_bytes(against_cost(gains(task, runs, length, wrong), *labels, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
