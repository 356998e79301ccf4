"""The documentation page on the results of :mod:`experiments.pareto`, with the advice that they support."""

from __future__ import annotations

from typing import Any

from bench.report import conditions

from .front import CHEAP, CLOSE, beats_sam, check, difference, needed
from .pareto_report import DRAWN, FIGURES, found, fronts, times


def words(mean: float, error: float | None) -> str:
    """Describe a difference in accuracy; within two standard errors it counts as chance."""
    if error is None:
        return f"{mean:+.2f} points in accuracy from one seed, which says nothing"
    certain = "" if abs(mean) > 2 * error else ", no more than chance"
    return f"{mean:+.2f} ± {error:.2f} points in accuracy{certain}"


def against(figures: dict[str, Any], task: dict[str, Any], name: str, other: str) -> str:
    """Compare one contender with another, over the same seeds."""
    values = {key: _accuracies(figures, task, key) for key in (name, other)}
    row, to = (next(row for row in task["rows"] if row["contender"] == key) for key in (name, other))
    return (
        f"`{name}` against `{other}`, {row['gradients']:.2f} gradients against {to['gradients']:.2f} and "
        f"{row['cost'] / to['cost']:.2f} of the time: {words(*difference(values[name], values[other]))}; λmax "
        f"{row['lambda_max'] / to['lambda_max']:.2f} times, R1 {row['r1'] / to['r1']:.2f} times"
    )


PAIRS = (
    (CLOSE, "GAM"),
    (CHEAP, "SAM"),
    ("GAM .25", "GAM"),
    ("GAM .25", "GAM .5 /2"),
    ("GAM .25", "GAM /4"),
    ("SAM .25", "SAM"),
    ("GAM", "SAM"),
)
"""The comparisons: shares with whole batches, GAM with SAM, shares with intervals at the same cost."""


def advice(figures: dict[str, Any], task: dict[str, Any]) -> list[str]:
    """Return the conclusions from the figures of a task."""
    by_name = {row["contender"]: row for row in task["rows"]}
    lines = [against(figures, task, a, b) for a, b in PAIRS if {a, b} <= by_name.keys()]
    for cost, unit in (("gradients", "gradients"), ("step_ms", "ms")):
        best = fronts(task, cost)
        for key, label in FIGURES.items():
            names = ", ".join(f"`{name}` ({by_name[name][cost]:.2f})" for name in best[key])
            lines.append(f"best {label.removesuffix(', %')} for its {unit}: {names}")
    if "SAM" in by_name:
        better = [row for row in task["rows"] if row["gradients"] < 2 and beats_sam(row, by_name["SAM"])]
        names = ", ".join(f"`{row['contender']}` ({row['gradients']:.2f})" for row in better) or "none"
        lines.append(f"cheaper than SAM with a mean accuracy at or above SAM's and λmax below: {names}")
    return lines


def _accuracies(figures: dict[str, Any], task: dict[str, Any], name: str) -> list[float]:
    return [run["accuracy"] for run in figures["runs"] if (run["task"], run["contender"]) == (task["name"], name)]


ADVICE = (
    ("GAM .25", "GAM", "GAM by a quarter of the batch in place of all of it"),
    ("GAM .5 /2", "GAM", "GAM by half of the batch at every second step in place of all of it at every step"),
    (
        "GAM .33 /2",
        "SAM",
        "GAM by a third of the batch at every second step in place of SAM by all of it at every step",
    ),
    ("GAM .25", "GAM /4", "GAM by a quarter of the batch at every step in place of whole batches at every fourth"),
    ("SAM .25", "SAM", "SAM by a quarter of the batch in place of all of it"),
)
"""Replacements to judge: a contender, the one it replaces, and a description."""


def which(figures: dict[str, Any]) -> list[str]:
    """Judge each replacement over all tasks: no loss of accuracy beyond chance, and no much sharper minimum."""
    lines = []
    for name, other, what in ADVICE:
        verdicts: dict[str, list[str]] = {"yes": [], "less accurate": [], "sharper": []}
        for task in figures["tasks"]:
            rows = {row["contender"]: row for row in task["rows"]}
            if not {name, other} <= rows.keys():
                continue
            mean, error = difference(_accuracies(figures, task, name), _accuracies(figures, task, other))
            sharper = rows[name]["lambda_max"] > SHARPER * rows[other]["lambda_max"]
            verdict = "less accurate" if mean < -2 * (error or 0.0) else "sharper" if sharper else "yes"
            verdicts[verdict].append(task["name"])
        said = [f"{verdict} on {', '.join(tasks)}" for verdict, tasks in verdicts.items() if tasks]
        if said:
            lines.append(f"{what}: {'; '.join(said)}")
    return lines


SHARPER = 1.3
"""The ratio of λmax from which a minimum counts as sharper."""


CHOICE = (
    f"By `{CHEAP}` and `{CLOSE}`. The radius and α of these and of `GAM .33 /2` were searched for on the seeds for "
    "settings, over ρ = .1 to .3 and α = 0 to .6; `GAM .25 /2` has theirs, `GAM /4` and `SAM /2` have what was best of "
    "two or three. The others have what the demo has, with an α of its own for a share of .15. `GAM .15`, `GAM .25` "
    "and then `GAM .33 /2` had been chosen before; their figures met the other claims, but forward and backward of so "
    "few rows take more than their share of the time."
)
"""How the contenders of the criteria were chosen."""


def small_batches(figures: dict[str, Any]) -> str:
    """Describe the time of a gradient of a share of the batch, relative to the whole batch."""
    parts = []
    for task in figures["tasks"]:
        alone = {one["share"]: one["ms"] for one in task["gradient_ms"]}
        each = ", ".join(f"{ms / alone[1.0]:.2f} ({share:g})" for share, ms in alone.items() if share < 1)
        parts.append(f"on {task['name']} {each}")
    return (
        "Gradients are not time: forward and backward of a share of the batch (in brackets) take, of the time of the "
        f"whole, {'; '.join(parts)}. The rest is what the optimizer adds to each pass, which does not "
        "shrink with the batch, and that batches of two sizes alternate."
    )


def page(figures: dict[str, Any]) -> str:
    """Return the page of docs/results: how it was made, tables, settings and advice."""
    seeds = ", ".join(map(str, figures["seeds"]))
    quick = ["**A quick run: its figures mean nothing.**", ""] if figures["quick"] else []
    lines = [
        "# What cheaper ascents find",
        "",
        *quick,
        f"Made by `{figures['command']} --markdown docs/results/pareto.md`; figures of every run are in",
        "`bench/results/pareto_cpu.json`.",
        "",
        "A number behind a method is the share of the batch that its ascent sees; `/2` means every second step, with",
        "plain steps between. Gradients per step are counted, each pass by its share. Accuracy, λmax and R1 (of the",
        f"training loss) are means over the seeds {seeds} ± standard deviation; − SAM is the mean difference in",
        "accuracy from SAM of the same seed, with its standard error. Times are medians of steps, as the contenders",
        "took turns, an epoch each; ÷ predicted is time ÷ base over gradients per step. A step of the base has one",
        "gradient and one update.",
        "",
        "Bars in the pictures are standard errors.",
        "",
    ]
    for task in figures["tasks"]:
        lines += [f"## {task['name']}", "", task["about"] + ".", "", _shared(task), "", *_pictures(task)]
        lines += [found(task).markdown(), ""]
        lines += [*(f"- {line}." for line in advice(figures, task)), "", "Time:", "", times(task).markdown(), ""]
        lines += [f"{note[0].upper()}{note[1:]}." for note in times(task).notes]
        lines += ["", *_settings(task), ""]
    lines += [
        "## Which to take",
        "",
        "Whether the one does what the other does, by these figures: *yes* if its accuracy is not lower by more than",
        f"two standard errors and λmax is within {SHARPER} times the other's. What is smaller than that, so many seeds",
        "do not show.",
        "",
        *(f"- {line}." for line in which(figures)),
        "",
        small_batches(figures),
        "",
    ]
    digits = next((task for task in figures["tasks"] if task["name"] == "digits"), None)
    if digits is not None and {*needed()} <= {row["contender"] for row in digits["rows"]}:
        lines += ["## What was to be shown", "", CHOICE, ""]
        lines += [
            f"- {'met' if one.is_met else '**missed**'}: {one.claim}. Found: {one.found}."
            for one in check(digits["rows"])
        ]
        lines.append("")
    return "\n".join([*lines, f"Made with: {conditions(figures)}, Python {figures['python']}.", ""])


def _shared(task: dict[str, Any]) -> str:
    hyper = ", ".join(f"{name} {value:g}" for name, value in task["hyper"].items())
    seeds = ", ".join(map(str, task["chosen_on"]))
    return (
        f"{task['epochs']} epochs, batches of {task['batch']}, {task['base']} with {hyper}, cosine schedule. λmax and "
        f"R1 (within ρ = {task['radius']:g}) are those of the loss of {task['measured']:,} examples of the training "
        f"set. Settings were chosen on seeds {seeds}, by accuracy on the same test set"
        f"{', with wrong labels' if task['name'] == 'clean' else ''}."
    )


def _pictures(task: dict[str, Any]) -> list[str]:
    return [
        line
        for key, (label, _) in DRAWN.items()
        for line in (f"![{task['name']}: {label} against time](../pareto_{task['name']}_{key}.png)", "")
    ]


def _settings(task: dict[str, Any]) -> list[str]:
    """List hyper-parameters, once for all contenders that share them."""
    by_text: dict[str, list[str]] = {}
    for row in task["rows"]:
        text = ", ".join(f"{name} = {value:g}" for name, value in row["settings"].items()) or f"{task['base']} alone"
        by_text.setdefault(text, []).append(f"`{row['contender']}`")
    return [f"- {', '.join(names)}: {text}" for text, names in by_text.items()]
