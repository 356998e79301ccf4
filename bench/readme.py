"""Write the tables of ``docs/performance.md`` from the files in ``bench/results``.

The text between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` is replaced by the table of that name.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .report import Table, conditions

ROOT = Path(__file__).resolve().parent.parent

MARKED = re.compile(r"(?<=<!-- bench:)(?P<name>\w+)(?P<open> -->\n).*?(?=<!-- /bench -->)", re.DOTALL)


class ResultError(ValueError):
    """Figures are missing; the message names the command that writes them."""


class Results:
    """The result files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, name: str, benchmark: str) -> dict[str, Any]:
        """Read one file.

        Raises:
            ResultError: the file is missing or not JSON.
        """
        path = self.folder / name
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ResultError(
                f"{path} cannot be read ({error}): python -m bench.{benchmark} --json {path} writes it"
            ) from error
        return found


def overhead(results: Results) -> str:
    """Return the table of the optimizer's part of a step, around SGD and around AdamW."""
    sgd = results.read("overhead_cpu.json", "overhead")["rows"]
    adamw = results.read("overhead_cpu_adamw.json", "overhead --base AdamW")["rows"]
    names = {"torch": "torch, `fused=True`"}
    columns = {"method": "", "ms": "SGD + momentum, ms", "ratio": "÷ torch", "floor": "floor by bytes"}
    columns |= {"adamw_ms": "AdamW, ms", "adamw_ratio": "÷ torch", "adamw_floor": "floor by bytes"}
    rows = []
    for first, second in zip(sgd, adamw, strict=True):
        row = {**first, **{f"adamw_{key}": value for key, value in second.items()}}
        row |= {key: f"{row[key]:.1f}" for key in ("ms", "adamw_ms")}
        rows.append({**row, "method": names.get(first["method"], f"`{first['method']}`")})
    return Table("", columns, rows).markdown()


def throughput(results: Results) -> str:
    """Return the table of whole steps of methods and peers."""
    figures = results.read("throughput_cpu.json", "throughput")
    columns = {
        "model": "model",
        "method": "method",
        "samples_per_s": "samples/s",
        "step": "step, ms",
        "optimizer": "of that the optimizer, ms",
        "overhead": "overhead",
        "to_sgd": "÷ SGD",
        "to_sam": "÷ SAM",
    }
    rows = []
    for row in figures["rows"]:
        medians = {part: f"{row[f'{part}_ms']['median']:.1f}" for part in ("step", "optimizer")}
        rows.append({**row, **medians, "samples_per_s": f"{row['samples_per_s']:.0f}"})
    setting = figures["setting"]
    about = f"Batch {setting['batch']}, {setting['dtype']}, {setting['repeats']} rounds; {conditions(figures)}."
    return f"{Table('', columns, rows).markdown()}\n\n{about}"


def growth(results: Results) -> str:
    """Return the table of the optimizer's growth: slopes, cost per tensor, and times by threads."""
    figures = results.read("growth_cpu.json", "growth")
    sweeps = {sweep["name"]: sweep for sweep in figures["sweeps"]}
    parameters, tensors, threads = (sweeps[name] for name in ("parameters", "tensors", "threads"))
    counts = list(dict.fromkeys(point["x"] for point in threads["points"]))
    columns = {"contender": "", "slope": "slope by parameters", "each": "µs a tensor"}
    columns |= {str(count): f"{count} thread{'s' * (count > 1)}, ms" for count in counts}
    rows = []
    for label, law in parameters["fits"].items():
        times = {str(p["x"]): f"{p['ms']:.1f}" for p in threads["points"] if p["label"] == label}
        slope = f"{law['slope']:.2f} ± {law['error']:.2f}"
        rows.append({"contender": label, "slope": slope, "each": tensors["us_each"][label], **times})
    least, most = (f"{end(point['x'] for point in tensors['points']):,}" for end in (min, max))
    about = (
        f"Slopes from {parameters['low']:,.0f} to {parameters['high']:,.0f} parameters {parameters['what']}; "
        f"{least} to {most} tensors {tensors['what']}; threads {threads['what']}; "
        f"{figures['dtype']}, {figures['base']}; {conditions(figures)}."
    )
    return f"{Table('', columns, rows).markdown()}\n\n{about}"


TABLES: Mapping[str, Callable[[Results], str]] = {f.__name__: f for f in (overhead, throughput, growth)}
"""The tables, by the names of their places in the page."""


def render(text: str, results: Results) -> str:
    """Return ``text`` with each marked place filled anew.

    Raises:
        ResultError: a place has an unknown name, or figures are missing.
    """

    def fill(place: re.Match[str]) -> str:
        name = place["name"]
        if name not in TABLES:
            raise ResultError(f"bench:{name} is no table: it must be of {', '.join(TABLES)}")
        return f"{name}{place['open']}\n{TABLES[name](results)}\n\n"

    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    """Update the page, or check it, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with status 1 if figures differ")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md", help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="default: bench/results")
    given = parser.parse_args(argv)
    try:
        text = given.page.read_text(encoding="utf-8")
        rendered = render(text, Results(given.results))
    except OSError as error:
        parser.error(f"--page: {error}")
    except ResultError as error:
        parser.error(str(error))
    if given.check:
        if rendered != text:
            print(f"{given.page}: tables are not those of {given.results}: run python -m bench.readme")
        return int(rendered != text)
    given.page.write_text(rendered, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
