"""Compare accuracy, λmax and R1 of SGD, SAM and GAM against their cost, over ascent shares and intervals.

The contenders of one seed alternate by epochs, so that their times are comparable. Gradients per step are counted in
the run: each pass by the share of the batch that it saw. The tables also give the time of a step over the base's, and
    over
the prediction from the count of gradients. Forward and backward of each share are also timed alone, which shows the
part of small batches in the excess. The rest is the optimizer, and the alternation of two batch sizes. Settings were
chosen on other seeds than the reported ones.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import options
from bench.contenders import machine
from bench.data import DataError
from bench.report import write_json

from . import pareto_page, pareto_report
from .front import check, needed, rows
from .runs import CONTENDERS, Contender, Run, gradient_ms, train
from .tasks import TASKS, Task

SEEDS = "0,1,2,3,4,5"
ENOUGH = 5
"""Fewest seeds for ``--check``."""

QUICK = 100
"""Examples in a quick run."""


def measure(task: Task, contenders: list[Contender], seeds: list[int]) -> tuple[dict[str, Any], list[Run]]:
    """Return a task with its rows, and their runs. Contenders without settings for the task are left out."""
    from rich.console import Console

    contenders = [contender for contender in contenders if contender.method in ("base", *task.methods)]
    shares = sorted({1.0, *(contender.share for contender in contenders)}, reverse=True)
    with Console(stderr=True).status("") as status:
        timed = gradient_ms(task, shares)
        runs = [run for seed in seeds for run in train(task, contenders, seed, status.update)]
    settings = {
        contender.name: task.settings(contender.method, contender.share, contender.interval) for contender in contenders
    }
    about = {
        "name": task.name,
        "about": task.about,
        "base": task.base.__name__,
        "hyper": dict(task.hyper),
        "epochs": task.epochs,
        "batch": task.batch,
        "radius": task.radius,
        "measured": min(task.measured, len(task.data.train_y)),
        "chosen_on": task.chosen_on,
        "gradient_ms": [{"share": share, "ms": ms} for share, ms in timed.items()],
        "rows": rows(runs, contenders, settings, timed),
    }
    return about, runs


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--task", default=",".join(TASKS), help="with commas (default: %(default)s)")
    found.add_argument("--seeds", type=options.seeds, default=SEEDS, help="with commas (default: %(default)s)")
    known = ", ".join(CONTENDERS)
    found.add_argument("--contenders", default="all", help=f"of {known}, with commas; base first (default: all)")
    found.add_argument("--threads", type=options.positive, default=1, help="CPU threads of torch (default: 1)")
    found.add_argument("--json", type=options.output, metavar="PATH", help="also write the figures to PATH")
    drawn = "also draw accuracy and λmax against time, to PATH_<task>_<what>.png"
    found.add_argument("--pictures", type=options.output, metavar="PATH", help=drawn)
    found.add_argument("--markdown", type=options.output, metavar="PATH", help="also write the page of docs/results")
    found.add_argument(
        "--read", type=Path, metavar="PATH", help="train nothing, and show the figures of an earlier --json"
    )
    quick = f"the first seed, one epoch, {QUICK} examples: to check that it works; the figures mean nothing"
    found.add_argument("--quick", action="store_true", help=quick)
    does = "say whether each criterion on the digits is met; exit with status 1 if one is not"
    found.add_argument("--check", action="store_true", help=does)
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    command = parser()
    given = command.parse_args(argv)
    given.task = options.listed(command, "--task", given.task, TASKS)
    if given.contenders == "all":
        given.contenders = list(CONTENDERS)
    else:
        given.contenders = options.listed(command, "--contenders", given.contenders, CONTENDERS)
    if given.contenders[0] != "base":
        command.error(f"--contenders must begin with base, which times are compared with, got {given.contenders[0]}")
    if given.check and given.read is None:
        if given.quick:
            command.error("--check: a quick run has nothing to be checked")
        if "digits" not in given.task or not {*needed()} <= {*given.contenders} or len(given.seeds) < ENOUGH:
            names = ", ".join(needed())
            command.error(f"--check needs --task digits, at least {ENOUGH} seeds, and of the contenders {names}")
    return given


def command(given: argparse.Namespace) -> str:
    """Return the command that makes the same figures again, without its output paths."""
    words = {"--task": ",".join(given.task), "--seeds": ",".join(map(str, given.seeds)), "--threads": given.threads}
    if given.contenders != list(CONTENDERS):
        words["--contenders"] = ",".join(given.contenders)
    return "python -m experiments.pareto " + shlex.join(str(word) for pair in words.items() for word in pair)


def compute(given: argparse.Namespace) -> dict[str, Any]:
    """Compute all figures.

    Raises:
        DataError: the data of a task are missing.
    """
    torch.set_num_threads(given.threads)
    tasks = [TASKS[name]() for name in given.task]
    if given.quick:
        tasks, given.seeds = [task.quick(QUICK) for task in tasks], given.seeds[:1]
    contenders = [CONTENDERS[name] for name in given.contenders]
    found = [measure(task, contenders, given.seeds) for task in tasks]
    return {
        "benchmark": "pareto",
        "command": command(given),
        "quick": given.quick,
        **machine(),
        "seeds": given.seeds,
        "tasks": [about for about, _ in found],
        "runs": [asdict(run) for _, runs in found for run in runs],
    }


def read(path: Path) -> dict[str, Any]:
    """Read the figures of an earlier run.

    Raises:
        DataError: the file has none.
    """
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if figures["benchmark"] != "pareto":
            raise KeyError("pareto")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no figures of this benchmark ({error}): --json writes them") from error
    return figures


def main(argv: list[str] | None = None) -> int:
    """Run the comparison from the command line."""
    given = parse(argv)
    try:
        figures = compute(given) if given.read is None else read(given.read)
    except DataError as error:
        parser().error(f"{'--task' if given.read is None else '--read'}: {error}")
    for table in pareto_report.tables(figures):
        table.show()
    if figures["quick"]:
        print("A quick run: it shows that everything works; its figures mean nothing.")
    write_json(given.json, figures)
    if given.pictures:
        for name, picture in pareto_report.pictures(figures).items():
            given.pictures.with_name(f"{given.pictures.name}_{name}.png").write_bytes(picture)
    if given.markdown:
        given.markdown.write_text(pareto_page.page(figures), encoding="utf-8")
    if not given.check:
        return 0
    try:
        criteria = check(next((task["rows"] for task in figures["tasks"] if task["name"] == "digits"), []))
    except KeyError as error:
        parser().error(f"--check: {given.read} has no {error} on the digits")
    for criterion in criteria:
        print(f"{'met   ' if criterion.is_met else 'MISSED'}  {criterion.claim}: {criterion.found}")
    return int(not all(criterion.is_met for criterion in criteria))


if __name__ == "__main__":
    sys.exit(main())
