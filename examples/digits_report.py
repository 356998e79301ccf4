"""The report of digits.py: one HTML file that contains its pictures, and the picture of the README."""

from __future__ import annotations

import base64
import html as html_text
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # before pyplot, so that no display is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gam_fast import flatness

HEADINGS = (
    "method",
    "gradients per step",
    "test accuracy, %",
    "training loss",
    "R0",
    "R1",
    "λmax",
    "trace",
    "ms/step",
    "cost ÷ SGD",
)
SHORT = ("method", "grads", "test acc., %", "loss", "R0", "R1", "λmax", "trace", "ms", "÷ SGD")
"""Short headings for a terminal of 80 columns."""

COLORS = {
    "SGD": "#8a8f98",
    "SAM": "#d9822b",
    "GAM": "#1f77c9",
    "GAM share .25": "#3bb3c3",
    "ExactGAM": "#2a9d5c",
    "ExactGAM+SAM": "#9b4dca",
}

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right; }
td:first-child, th:first-child, .words td, .words th { text-align: left; }
thead th { background: var(--soft); } tbody tr:hover { background: var(--soft); }
img { width: 100%; height: auto; border-radius: 6px; background: #fff; } figure { margin: 1rem 0; }
figcaption, .note { opacity: .8; font-size: .9rem; }
pre { background: var(--soft); padding: .7rem 1rem; border-radius: 6px; overflow-x: auto; }
.warning { border-left: 4px solid #d9822b; padding: .3rem 1rem; background: var(--soft); }
"""


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of the summary as text, in the order of ``HEADINGS``."""
    spread = row["accuracy_std"]
    return (
        row["method"],
        f"{row['gradients']:.2f}",
        f"{row['accuracy_mean']:.2f}" + ("" if spread is None else f" ± {spread:.2f}"),
        f"{row['train_loss']:.3f}",
        f"{row['r0']:.3f}",
        f"{row['r1']:.3f}",
        f"{row['lambda_max']:.1f}",
        f"{row['trace']:.0f}",
        f"{row['step_ms']:.1f}",
        f"{row['cost']:.2f}",
    )


def _by_method(figures: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {name: [r for r in figures["runs"] if r["method"] == name] for name in figures["methods"]}


def _curves(axes: Axes, figures: dict[str, Any], key: str, label: str) -> None:
    """Plot the mean over seeds and the range from lowest to highest; a single epoch is a point."""
    for name, runs in _by_method(figures).items():
        series = list(zip(*(run[key] for run in runs), strict=True))
        epochs = range(1, len(series) + 1)
        marker = "o" if len(series) == 1 else None
        axes.plot(epochs, [statistics.mean(v) for v in series], color=COLORS[name], label=name, marker=marker)
        axes.fill_between(
            epochs, [min(v) for v in series], [max(v) for v in series], color=COLORS[name], alpha=0.2, linewidth=0
        )
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def _points(axes: Axes, figures: dict[str, Any], label: str, value: Callable[[dict[str, Any]], float]) -> None:
    """Plot one point per seed and the mean of each method; lines join the points of a seed."""
    by_method = {name: [value(run) for run in runs] for name, runs in _by_method(figures).items()}
    for heights in zip(*by_method.values(), strict=True):
        axes.plot(range(len(heights)), heights, color="#8886", linewidth=1, zorder=1)
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    for place, (name, values) in enumerate(by_method.items()):
        axes.scatter([place] * len(values), values, color=COLORS[name], s=45, zorder=3)
        mean = statistics.mean(values)
        axes.hlines(mean, place - 0.2, place + 0.2, color=COLORS[name], linewidth=2, zorder=2)
        axes.annotate(f"{mean:.1f}", (place + 0.23, mean), va="center", color=COLORS[name], bbox=behind, weight="bold")
    axes.set_xticks(range(len(by_method)), [name.replace(" ", "\n", 1) for name in by_method])
    axes.set(ylabel=label, xlim=(-0.4, len(by_method) - 0.3))


def _accuracy(axes: Axes, figures: dict[str, Any]) -> None:
    _points(axes, figures, "test accuracy, %", lambda run: float(run["test_accuracy"][-1]))


def _curvature(axes: Axes, figures: dict[str, Any]) -> None:
    _points(axes, figures, "λmax of the training loss", lambda run: float(run["lambda_max"]))
    axes.set_ylim(bottom=0)


def _slice(axes: Axes, figures: dict[str, Any], quantity: str, label: str) -> None:
    """Plot slices around the minimum of each method for the first seed."""
    firsts = {name: runs[0] for name, runs in _by_method(figures).items()}
    axes.set_prop_cycle(color=[COLORS[name] for name in firsts])
    slices = {
        name: flatness.Slice(tuple(run["offsets"]), tuple(run["loss_slice"]), tuple(run["gradient_norm_slice"]))
        for name, run in firsts.items()
    }
    flatness.plot_slice(slices, quantity, log=True, axes=axes)
    axes.set(xlabel="offset along a random direction, in filter lengths", ylabel=label)
    axes.legend(loc="upper center", frameon=False, fontsize=9)


def _spectra(axes: Axes, figures: dict[str, Any]) -> None:
    """Plot the final eigenvalue density of the Hessian of each method for the first seed."""
    firsts = {name: runs[0] for name, runs in _by_method(figures).items()}
    axes.set_prop_cycle(color=[COLORS[name] for name in firsts])
    spectra = {}
    for name, run in firsts.items():
        grid, steps = tuple(run["eigenvalues"]), figures["setting"]["lanczos_steps"]
        spectra[name] = flatness.SpectralDensity(grid, tuple(run["density"]), (grid[0], grid[-1]), steps, steps)
    flatness.plot_spectrum(spectra, axes=axes)


def _figure(*draw: Callable[[Axes], None], width: float = 5.5, dpi: int = 110) -> bytes:
    """Return panels side by side, as PNG."""
    figure: Figure
    figure, axes = plt.subplots(1, len(draw), figsize=(width * len(draw), 4.0), layout="constrained", squeeze=False)
    for axis, paint in zip(axes[0], draw, strict=True):
        paint(axis)
        axis.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    plt.close(figure)
    return file.getvalue()


def picture(figures: dict[str, Any]) -> bytes:
    """Return accuracy and the slice of the gradient norm, as PNG."""
    return _figure(
        lambda axes: _accuracy(axes, figures),
        lambda axes: _slice(axes, figures, "gradient_norm", "gradient norm around the minimum"),
        width=4.2,
        dpi=150,
    )


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    text = html_text.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "figures") -> str:
    def line(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html_text.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    table = f'<table class="{kind}"><thead>{line("th", headings)}</thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _settings(figures: dict[str, Any]) -> str:
    """Return the section on methods, settings, software, machine and command."""
    methods = [
        (name, ", ".join(f"{key} = {value}" for key, value in hyper.items()) or "–")
        for name, hyper in figures["methods"].items()
    ]
    shared = [
        (key, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
        for key, value in figures["setting"].items()
    ]
    used = [(key, str(value)) for key, value in figures["machine"].items()]
    return f"""<h2>Settings</h2>{_table(("method", "hyper-parameters"), methods, "words")}
<p>Shared by all methods:</p>{_table(("setting", "value"), shared, "words")}
<p>Made with:</p>{_table(("software and machine", ""), used, "words")}
<p>Command:</p><pre>{html_text.escape(figures["command"])}</pre>"""


def _pictures(figures: dict[str, Any]) -> str:
    points = _figure(lambda axes: _accuracy(axes, figures), lambda axes: _curvature(axes, figures))
    curves = _figure(
        lambda axes: _curves(axes, figures, "train_loss", "cross-entropy on the training set, nats"),
        lambda axes: _curves(axes, figures, "test_accuracy", "test accuracy, %"),
    )
    slices = _figure(
        lambda axes: _slice(axes, figures, "loss", "cross-entropy on the training set, nats"),
        lambda axes: _slice(axes, figures, "gradient_norm", "norm of its gradient"),
    )
    flat = _figure(
        lambda axes: _points(axes, figures, "R1, first-order flatness", lambda run: float(run["r1"])),
        lambda axes: _spectra(axes, figures),
    )
    first = figures["setting"]["seeds"][0]
    return f"""<h2>Accuracy and curvature, seed by seed</h2>{
        _image(points, "At the end of training: a point a seed, a bar and a number at the mean; lines join a seed.")
    }
<h2>Flatness</h2>{
        _image(
            flat,
            f"First-order flatness within ρ = {figures['setting']['radius']}, seed by seed; and the density of the "
            f"eigenvalues of the Hessian from seed {first}, every peak as wide as the resolution of the method.",
        )
    }
<h2>Training</h2>{
        _image(
            curves,
            "After each epoch, in eval mode: on the training set with its wrong labels, and on the test images. Mean "
            "over the seeds; the band reaches from the lowest to the highest seed.",
        )
    }
<h2>Around the minima</h2>{
        _image(
            slices,
            f"From seed {first}, along one random direction, from the same random numbers for all methods, each of its "
            "filters as long as the weights' own: at offset 1 a filter has moved by its own length.",
        )
    }"""


def _outcome(figures: dict[str, Any]) -> str:
    """Say in how many seeds GAM did better than the others; with few seeds this says more than a mean."""
    runs = _by_method(figures)
    sentences = []
    if "GAM" not in runs:
        return ""
    for other in [name for name in runs if name != "GAM"]:
        pairs = list(zip(runs["GAM"], runs[other], strict=True))
        higher = sum(gam["test_accuracy"][-1] > run["test_accuracy"][-1] for gam, run in pairs)
        flatter = sum(gam["r1"] < run["r1"] for gam, run in pairs)
        curved = sum(gam["lambda_max"] < run["lambda_max"] for gam, run in pairs)
        sentences.append(
            f"Against {other}, GAM has the higher test accuracy in {higher}, the smaller R1 in {flatter} and the "
            f"smaller λmax in {curved} of {len(pairs)} seeds."
        )
    return " ".join(sentences)


def html(figures: dict[str, Any], *, quick: bool) -> str:
    """Return the whole report."""
    setting = figures["setting"]
    seeds = ", ".join(map(str, setting["seeds"]))
    *most, last = figures["methods"]
    names = html_text.escape(f"{', '.join(most)} and {last}" if most else last)
    warning = '<p class="warning"><strong>A quick run: its figures mean little.</strong></p>' if quick else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{names} on handwritten digits</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>{names} on handwritten digits with wrong labels</h1>
{warning}
<p>A small convolutional network with BatchNorm is trained on 1,000 images of MNIST (14 × 14 pixels), of which
{100 * setting["wrong_labels"]:.0f} % got a random label, and tested on 4,000 others. All methods start from the same
weights and see the same batches: {setting["epochs"]} epochs, batches of {setting["batch_size"]}, SGD with lr
{setting["lr"]} and momentum {setting["momentum"]}, cosine schedule; seeds {seeds}. The settings were chosen on seeds 10
and 11, before these results were made.</p>
{_table(HEADINGS, [cells(row) for row in figures["summary"]])}
<p class="note">Gradients per step: counted in the run, each by the share of the batch that it was taken of; a method
with a share ascends by the gradients of the first rows of a batch, and descends by that of all. Test accuracy: at the
end, mean{" ± standard deviation" if len(setting["seeds"]) > 1 else ""} over the seeds. Training loss: cross-entropy on
the training set with its wrong labels, in eval mode, mean over the seeds; so are the rest, of that loss L at the
weights θ: R0, the largest L(θ + δ) − L(θ), and R1, ρ times the largest norm of a gradient at θ + δ, over all δ no
longer than ρ = {setting["radius"]}; λmax and trace of the Hessian. ms/step: median over all steps, all passes of a step
together; the methods took turns, an epoch each.</p>
<p>{_outcome(figures)}</p>
{_pictures(figures)}
{_settings(figures)}
</body></html>
"""


def markdown(figures: dict[str, Any]) -> str:
    """Return the page of docs/results: the table, and how it was made."""
    setting = figures["setting"]
    rows = [HEADINGS, ["---"] * len(HEADINGS), *(cells(row) for row in figures["summary"])]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    methods = "\n".join(
        f"- {name}: {', '.join(f'{key} = {value}' for key, value in hyper.items()) or 'SGD with momentum alone'}"
        for name, hyper in figures["methods"].items()
    )
    used = ", ".join(f"{key} {value}" for key, value in figures["machine"].items())
    seeds = ", ".join(map(str, setting["seeds"]))
    return f"""# Handwritten digits with wrong labels

Made by `{figures["command"]} --markdown docs/results/digits.md`; the report in HTML explains every figure.

{table}

Gradients per step are counted, each by the share of the batch that it was taken of (`ascent_share`). Means over the
seeds {seeds}, test accuracy with its standard deviation; R0 and R1 within ρ = {setting["radius"]},
on the training set with its wrong labels. {setting["epochs"]} epochs, batches of {setting["batch_size"]}, SGD with lr
{setting["lr"]} and momentum {setting["momentum"]}, cosine schedule. Settings were chosen on seeds 10 and 11.

{methods}

{_outcome(figures)}

Made with: {used}.
"""
