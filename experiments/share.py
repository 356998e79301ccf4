"""Show what a share of the batch changes about a step of GAM, and whether BatchNorm is the reason.

python -m experiments.share --data cifar10.npz --json bench/results/share_cpu.json

SGD trains the small ResNet of ``examples/cifar.py`` for a few epochs. From there, three kinds of steps of GAM are
computed for each of several batches:

- with the whole batch in every pass,
- with a share of it in all passes but the last,
- with the loss of a share only. The forward pass then sees the whole batch, and BatchNorm takes its statistics from it.

Each step is compared with the first kind, by the cosine of the angle between them and by its length. So are the
gradients of the whole batch and of its leading quarter.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gam_fast
from bench import options
from bench.contenders import machine
from bench.report import Table, write_json

from .evidence import GAM, SMALL  # puts examples/ on the path

# isort: split
import cifar
import cifar_images

SHARES = (0.5, 0.25)
SCHEDULE = 30  # epochs of the cosine schedule, of which only the first are trained
COLUMNS = {"step": "", "cosine": "cosine to GAM's", "error": "standard error", "length": "length ÷ GAM's"}


def vector(model: nn.Module) -> Tensor:
    """Return a copy of all parameters as one vector. They need not be contiguous."""
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def step(model: nn.Module, x: Tensor, y: Tensor, method: str, share: float = 1.0, *, whole: bool = False) -> Tensor:
    """Return a step of the method with learning rate 1; with ``whole``, the forward pass sees all rows."""
    model = copy.deepcopy(model).train()
    kind = getattr(gam_fast, method)
    hyper = GAM if method == "GAM" else {}
    optimizer = kind(model.parameters(), torch.optim.SGD, lr=1.0, model=model, ascent_share=share, **hyper)
    before = vector(model)
    for turn in optimizer.passes():
        if whole:
            rows = turn.count(len(x))
            loss = cross_entropy(model(x)[:rows], y[:rows])
        else:
            own_x, own_y = turn.rows(x, y)
            loss = cross_entropy(model(own_x), own_y)
        turn.backward(loss)
    return before - vector(model)


def steps(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return the steps to compare, that of GAM first."""
    quarter = len(x) // 4
    found = {"GAM": step(model, x, y, "GAM")}
    for share in SHARES:
        found[f"GAM, share {share:g}"] = step(model, x, y, "GAM", share)
        found[f"GAM, share {share:g}, statistics of all rows"] = step(model, x, y, "GAM", share, whole=True)
    found["SGD"] = step(model, x, y, "Base")
    found["SGD on a quarter of the batch"] = step(model, x[:quarter], y[:quarter], "Base")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="as for examples/cifar.py")
    parser.add_argument("--images", type=options.positive, default=2000, help="to train on (default: %(default)s)")
    parser.add_argument("--epochs", type=options.positive, default=3, help="of SGD (default: %(default)s)")
    parser.add_argument("--batches", type=options.positive, default=12, help="to compare on (default: %(default)s)")
    parser.add_argument("--batch", type=options.positive, default=128, help="rows of each (default: %(default)s)")
    parser.add_argument("--threads", type=options.positive, default=1, help="CPU threads of torch (default: 1)")
    parser.add_argument("--json", type=options.output, metavar="PATH", help="write the figures to PATH")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    settings = replace(SMALL, train_images=given.images, epochs=SCHEDULE, batch=given.batch, bf16=False)
    training = cifar.Run(settings, given.data, torch.device("cpu"))
    for epoch in range(given.epochs):
        print(f"epoch {epoch + 1}: loss {training.train():.3f}", file=sys.stderr)
    found: dict[str, list[tuple[float, float]]] = {}
    batches: list[Any] = []
    while len(batches) < given.batches:
        batches += cifar_images.batches(training.train_set, given.batch, 1000 + len(batches), 0, 1)
    for x, y in batches[: given.batches]:
        of_batch = steps(training.model, x, y)
        whole = of_batch["GAM"]
        for name, own in of_batch.items():
            lengths = float(own.norm()), float(whole.norm())
            found.setdefault(name, []).append((float(own @ whole) / (lengths[0] * lengths[1]), lengths[0] / lengths[1]))
    rows = []
    for name, pairs in found.items():
        cosines, lengths = zip(*pairs, strict=True)
        error = statistics.stdev(cosines) / len(cosines) ** 0.5 if len(cosines) > 1 else None
        rows.append(
            {"step": name, "cosine": statistics.mean(cosines), "error": error, "length": statistics.mean(lengths)}
        )
    shown = [{key: f"{row[key]:.3f}" if isinstance(row[key], float) else row[key] for key in COLUMNS} for row in rows]
    Table(f"{given.images} images, {given.epochs} epochs of SGD, batch {given.batch}", COLUMNS, shown).show()
    chosen = {name: getattr(given, name) for name in ("images", "epochs", "batches", "batch", "threads")}
    write_json(given.json, {"benchmark": "share", **machine(), **chosen, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
