"""The report of digits.py: one HTML file with its pictures inside, and the picture of the README."""

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

HEADINGS = ("method", "passes", "test accuracy, %", "training loss", "λmax", "ms/step", "cost ÷ SGD")
COLORS = {"SGD": "#8a8f98", "SAM": "#d9822b", "GAM": "#1f77c9"}

STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; } th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); }
td, th { text-align: right; } td:first-child, th:first-child { text-align: left; }
img { width: 100%; height: auto; border-radius: 6px; background: #fff; } figure { margin: 1rem 0; }
figcaption, footer { opacity: .8; font-size: .9rem; }
"""


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the summary as text, in the order of ``HEADINGS``."""
    return (
        row["method"],
        str(row["passes"]),
        f"{row['accuracy_mean']:.2f} ± {row['accuracy_std']:.2f}",
        f"{row['train_loss']:.3f}",
        f"{row['lambda_max']:.1f}",
        f"{row['step_ms']:.1f}",
        f"{row['cost']:.2f}",
    )


def _by_method(figures: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {name: [r for r in figures["runs"] if r["method"] == name] for name in figures["methods"]}


def _curves(axes: Axes, figures: dict[str, Any], key: str, label: str) -> None:
    """Mean over seeds, with the range between the lowest and the highest."""
    for name, runs in _by_method(figures).items():
        series = list(zip(*(run[key] for run in runs), strict=True))
        epochs = range(1, len(series) + 1)
        axes.plot(epochs, [statistics.mean(values) for values in series], color=COLORS[name], label=name)
        axes.fill_between(
            epochs, [min(v) for v in series], [max(v) for v in series], color=COLORS[name], alpha=0.2, linewidth=0
        )
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def _accuracy(axes: Axes, figures: dict[str, Any]) -> None:
    """A point a seed and the mean of each method; points of one seed are joined."""
    by_method = _by_method(figures)
    for seed in range(len(figures["setting"]["seeds"])):
        heights = [runs[seed]["test_accuracy"][-1] for runs in by_method.values()]
        axes.plot(range(len(heights)), heights, color="#8886", linewidth=1, zorder=1)
    for place, (name, runs) in enumerate(by_method.items()):
        values = [run["test_accuracy"][-1] for run in runs]
        axes.scatter([place] * len(values), values, color=COLORS[name], s=45, zorder=2)
        mean = statistics.mean(values)
        axes.hlines(mean, place - 0.25, place + 0.25, color=COLORS[name], linewidth=2)
        axes.annotate(f"{mean:.1f} %", (place + 0.28, mean), va="center", color=COLORS[name])
    axes.set_xticks(range(len(by_method)), list(by_method))
    axes.set(ylabel="test accuracy, %", xlim=(-0.5, len(by_method) - 0.2))


def _slice(axes: Axes, figures: dict[str, Any], key: str, label: str) -> None:
    """Around the minimum of each method from the first seed."""
    for name, runs in _by_method(figures).items():
        axes.plot(runs[0]["offsets"], runs[0][key], color=COLORS[name], label=name)
    axes.set(xlabel="offset along a random direction, in lengths of each filter", ylabel=label, yscale="log")
    axes.legend(frameon=False)


def _figure(*draw: Callable[[Axes], None], dpi: int = 110) -> bytes:
    """Panels side by side, as PNG."""
    figure: Figure
    figure, axes = plt.subplots(1, len(draw), figsize=(5.5 * len(draw), 4.0), layout="constrained", squeeze=False)
    for axis, paint in zip(axes[0], draw, strict=True):
        paint(axis)
        axis.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    plt.close(figure)
    return file.getvalue()


def picture(figures: dict[str, Any]) -> bytes:
    """Accuracy and the slice of the gradient norm, as PNG."""
    return _figure(
        lambda axes: _accuracy(axes, figures),
        lambda axes: _slice(axes, figures, "gradient_norm_slice", "gradient norm around the minimum"),
    )


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    text = html_text.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html_text.escape(value)}</{tag}>" for value in values) + "</tr>"

    return (
        f"<table><thead>{line('th', headings)}</thead><tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"
    )


def html(figures: dict[str, Any], *, quick: bool) -> str:
    """The whole report."""
    setting, versions = figures["setting"], figures["machine"]
    methods = [
        (name, ", ".join(f"{key} = {value}" for key, value in hyper.items()) or "–")
        for name, hyper in figures["methods"].items()
    ]
    seeds = ", ".join(map(str, setting["seeds"]))
    warning = "<p><strong>A quick run: its figures mean little.</strong></p>" if quick else ""
    curves = _figure(
        lambda axes: _curves(axes, figures, "train_loss", "loss on the training set (eval mode)"),
        lambda axes: _curves(axes, figures, "test_accuracy", "test accuracy, %"),
    )
    slices = _figure(
        lambda axes: _slice(axes, figures, "loss_slice", "loss on the training set"),
        lambda axes: _slice(axes, figures, "gradient_norm_slice", "gradient norm"),
    )
    accuracy = _figure(lambda axes: _accuracy(axes, figures))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>SGD, SAM and GAM on handwritten digits</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>
<h1>SGD, SAM and GAM on handwritten digits with wrong labels</h1>
{warning}
<p>A small convolutional network with BatchNorm is trained on 1,000 images of MNIST (14 × 14 pixels), of which
{100 * setting["wrong_labels"]:.0f} % got a random label, and tested on 4,000 others. All methods start from the same
weights and see the same batches: {setting["epochs"]} epochs, batches of {setting["batch_size"]}, SGD with lr
{setting["lr"]} and momentum {setting["momentum"]}, cosine schedule; seeds {seeds}. The settings were fixed on other
seeds before these were run.</p>
{_table(HEADINGS, [cells(row) for row in figures["summary"]])}
<p>Test accuracy: mean ± standard deviation over the seeds, at the end. Training loss: on the training set with its
wrong labels, in eval mode. λmax: the largest eigenvalue of the Hessian of that loss, mean over seeds. ms/step: median
over all steps; the methods took turns, an epoch each.</p>
<h2>Accuracy</h2>{_image(accuracy, "Test accuracy at the end: a point a seed, a bar at the mean; lines join a seed.")}
<h2>Training</h2>{_image(curves, "Mean over seeds; the band reaches from the lowest to the highest seed.")}
<h2>Around the minima</h2>{
        _image(
            slices,
            f"From seed {setting['seeds'][0]}, along one random direction, its filters as long as the weights'.",
        )
    }
<h2>Settings</h2>{_table(("method", "hyper-parameters"), methods)}
<footer><p>gam_fast {versions["gam_fast"]}, torch {versions["torch"]}, Python {versions["python"]},
{versions["processor"]}, {versions["cores"]} cores, {versions["threads"]} threads.</p></footer>
</body></html>
"""
