"""Measure how the cost of a GAM step grows with parameters, tensors and threads, against a plain loop and torch's step.

The time is that of the optimizer: the closure provides fresh gradients, and its own time, copies included, is
subtracted. Contenders take turns; times are medians with their spread. Python's garbage collector stays on (see
:func:`bench.rounds.rounds`). The lines are power laws, fitted on logarithms over the range that the table names. The
plain loop is first compared with gam_fast in fp64. The run takes about three minutes on two cores. Sizes that do not
fit into memory are left out, with a note.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import options
from .contenders import HYPER, machine
from .peers import PEERS, disagreement
from .power_law import PowerLaw, cost_of_each, fit
from .report import Table, conditions, panels, png, write_json
from .sweeps import PLAIN, SWEEPS, Setting, Sweep

MOST_TENSORS = 10_000
"""Number of tensors at which the cost per tensor is judged."""


@dataclass(frozen=True)
class Target:
    """A figure and its allowed range.

    Attributes:
        what: the name of the figure.
        value: ``None`` if it could not be measured for lack of memory.
        low, high: the allowed range.
    """

    what: str
    value: float | None
    low: float
    high: float

    @property
    def met(self) -> bool:
        """True if the figure was measured and is in the range."""
        return self.value is not None and self.low <= self.value <= self.high

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.3g}"
        bound = f"at most {self.high:g}" if self.low == 0.0 else f"{self.low:g} to {self.high:g}"
        return f"{self.what}: {value}, must be {bound}{'' if self.met else ': MISSED'}"


def fits(sweep: Sweep) -> dict[str, PowerLaw]:
    """Return the power law of each contender with enough points."""
    found = {label: fit(*sweep.of(label), sweep.low, sweep.high) for label in sweep.labels}
    return {label: law for label, law in found.items() if law is not None}


def targets(sweep: Sweep, setting: Setting) -> list[Target]:
    """Return the targets of a full sweep."""
    gam = setting.gam
    if sweep.name == "parameters":
        law = fits(sweep).get(gam)
        low, high = (law.low, law.high) if law else (sweep.low, sweep.high)
        return [Target(f"slope of {gam}, {low:.0e} to {high:.0e} parameters", law.slope if law else None, 0.95, 1.05)]
    if sweep.name == "tensors":
        ms, plain = sweep.at(gam, MOST_TENSORS), sweep.at(PLAIN, MOST_TENSORS)
        return [
            Target(f"µs a tensor, {gam}, {MOST_TENSORS:,} tensors", 1e3 * ms / MOST_TENSORS, 0.0, 2.0),
            Target(f"{gam} ÷ {PLAIN}, {MOST_TENSORS:,} tensors", ms / plain, 0.0, 0.05),
        ]
    ratio = sweep.at(gam, setting.threads) / sweep.at(PLAIN, setting.threads)
    return [Target(f"{gam} ÷ {PLAIN}, ResNet-50, {setting.threads} threads", ratio, 0.0, 0.35)]


def table(sweep: Sweep) -> Table:
    """Return the table of a sweep: milliseconds, slopes, and the cost per tensor, fitted and at the last point."""
    labels, laws = sweep.labels, fits(sweep)
    title = f"{sweep.name} {sweep.what}: ms ± %"
    if laws:
        law = next(iter(laws.values()))
        title += f"; slopes from {law.low:,} to {law.high:,}"
    rows: list[dict[str, str]] = []
    for x in dict.fromkeys(point.x for point in sweep.points):
        times = {point.label: f"{point.ms:.3g} ± {point.spread:.0f} %" for point in sweep.points if point.x == x}
        rows.append({"x": f"{x:,}", **times})
    if laws:
        rows.append({"x": "slope", **{label: f"{law.slope:.2f} ± {law.error:.2f}" for label, law in laws.items()}})
    if sweep.name == "tensors":
        rows.append({"x": "µs, fitted", **{label: f"{1e3 * cost_of_each(*sweep.of(label)):.3g}" for label in labels}})
        last = {label: (xs[-1], ms[-1]) for label, (xs, ms) in zip(labels, map(sweep.of, labels), strict=True)}
        rows.append({"x": "µs, last", **{label: f"{1e3 * ms / x:.3g}" for label, (x, ms) in last.items()}})
    notes = [f"left out: {sweep.left_out}"] if sweep.left_out else []
    return Table(title, {"x": sweep.name, **{label: label for label in labels}}, rows, notes)


def draw(sweeps: list[Sweep], facts: dict[str, Any]) -> bytes:
    """Draw a log-log panel for each sweep: points, and fitted lines with their slopes."""
    figure, axes = panels(len(sweeps), 4.2, facts)
    for sweep, axis in zip(sweeps, axes, strict=True):
        laws = fits(sweep)
        for k, label in enumerate(sweep.labels):
            law = laws.get(label)
            name = f"{label}: slope {law.slope:.2f} ± {law.error:.2f}" if law else label
            axis.loglog(*sweep.of(label), "o", color=f"C{k}", markersize=4, label=name)
            if law:
                axis.loglog([law.low, law.high], [law(law.low), law(law.high)], color=f"C{k}", linewidth=1)
        if sweep.name == "threads":
            counts = sweep.of(sweep.labels[0])[0]
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.minorticks_off()
        axis.set_xlabel(f"{sweep.name} {sweep.what}", fontsize=10)
        axis.set_ylabel("ms, optimizer's part of a step")
        axis.legend(fontsize=9)
        axis.grid(alpha=0.3)
    return png(figure)


def figures_of(sweep: Sweep) -> dict[str, Any]:
    """Return the JSON entry of a sweep."""
    found = {**asdict(sweep), "fits": {label: asdict(law) for label, law in fits(sweep).items()}}
    if sweep.name == "tensors":
        found["us_each"] = {label: 1e3 * cost_of_each(*sweep.of(label)) for label in sweep.labels}
    return found


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="bench.growth", description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_common(parser, rounds=7, files=("json", "png"))
    options.add_backend(parser)
    parser.add_argument("--sweep", help=f"of {', '.join(SWEEPS)}, with commas (default: all; on cuda not threads)")
    parser.add_argument("--base", default="SGD", choices=tuple(HYPER), help="base optimizer (default: SGD)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float64", "bfloat16"), help="default: float32"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it works")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a target is missed")
    return parser


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and the names of the sweeps."""
    command = parser()
    arguments = options.parse(command, argv)
    names = options.listed(command, "--sweep", arguments.sweep or ",".join(SWEEPS), SWEEPS)
    if not arguments.sweep and arguments.device == "cuda":
        names.remove("threads")
    if arguments.device == "cuda" and "threads" in names:
        command.error("--sweep threads needs --device cpu: a GPU does not work faster for more threads of the CPU")
    if arguments.device == "cpu" and "parameters" in names and not sys.platform.startswith("linux"):
        command.error(
            "--sweep parameters reads the available memory from /proc, which only Linux has: leave it out, or use "
            "--device cuda"
        )
    if arguments.check and (arguments.quick or arguments.device == "cuda"):
        command.error("--check is for the whole range on a CPU: leave out --quick and --device cuda")
    return arguments, names


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    arguments, names = parse(argv)
    setting = Setting(
        arguments.device,
        arguments.base,
        getattr(torch, arguments.dtype),
        arguments.backend,
        arguments.threads,
        arguments.repeats,
        arguments.quick,
    )
    torch.set_num_threads(arguments.threads)
    plain = PEERS["plain-gam"]
    if (apart := disagreement(plain, backend=arguments.backend, device=arguments.device)) > plain.tolerance:
        print(f"{plain.name} and {setting.gam} do not agree: their trajectories are {apart:.1e} apart", file=sys.stderr)
        return 1
    facts = machine(arguments.device)
    print(f"{arguments.dtype}, {arguments.base}; {conditions(facts)}")
    sweeps = []
    for name in names:
        sweeps.append(SWEEPS[name](setting))
        table(sweeps[-1]).show()
    found = [] if arguments.quick else [target for sweep in sweeps for target in targets(sweep, setting)]
    for target in found:
        print(target)
    figures = {
        **facts,
        "dtype": arguments.dtype,
        "base": arguments.base,
        "sweeps": [figures_of(sweep) for sweep in sweeps],
        "targets": [{**asdict(target), "met": target.met} for target in found],
    }
    write_json(arguments.json, figures)
    if arguments.png:
        arguments.png.write_bytes(draw(sweeps, facts))
    return 1 if arguments.check and not all(target.met for target in found) else 0


if __name__ == "__main__":
    sys.exit(main())
