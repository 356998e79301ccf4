"""Each primitive and whole steps, against the speed of memory: time, bytes, GB/s, and the ratio to a plain copy.

Bytes are those of a fully fused primitive (see gam_fast.backends.base), whatever a backend really moves. A copy, and a
sum that only reads, take turns in the same run. A ratio of 1.00 means that the primitive moves its bytes as fast as
torch's copy. Whole steps are compared with torch's own fused SGD and AdamW. On a GPU times are the device's, by events
while launches queue up; "host" is the host's time of one call.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gam_fast import backends
from gam_fast.backends import base

from . import options
from .clock import time_call
from .compiled import Compiled
from .contenders import FLOOR, Contender, machine, measure
from .models import MODELS, Shapes, numel, quick
from .report import Table, conditions, panels, png, write_json

BACKENDS = ("eager", "native", "triton", "compile")
STEPS = (
    ("torch", "SGD", torch.float32),
    ("SAM", "SGD", torch.float32),
    ("GAM", "SGD", torch.float32),
    ("GAM", "SGD", torch.bfloat16),
    ("torch", "AdamW", torch.float32),
    ("GAM", "AdamW", torch.float32),
)

PRIMITIVE_COLUMNS = {
    "primitive": "primitive",
    "backend": "backend",
    "units": "units",
    "ms": "ms",
    "host_us": "host, µs",
    "gb_per_s": "GB/s",
    "to_copy": "÷ copy",
    "to_sum": "÷ sum",
}
STEP_COLUMNS = {
    "step": "step",
    "backend": "backend",
    "dtype": "dtype",
    "ms": "ms",
    "host_ms": "host, ms",
    "to_torch": "÷ torch",
    "floor": "floor",
    "to_fp32": "÷ fp32",
}


@dataclass
class Row:
    """One timed operation, with ``units`` reads and writes per element."""

    name: str
    backend: str
    units: int
    run: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)
    on_host: list[float] = field(default_factory=list)

    def time(self, device: str) -> None:
        """Time one call on device and host."""
        for times, found in zip((self.seconds, self.on_host), time_call(self.run, device), strict=True):
            times.append(found)


class Primitives:
    """Tensors of one model, and every primitive on them, as in a step of GAM."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.device = torch.device(device)
        # as the engine passes a norm: a number on a CPU
        self.one: Tensor | float = 1.0 if device == "cpu" else torch.ones((), dtype=torch.float64, device=device)

        def tensors() -> list[Tensor]:
            return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]

        self.params, self.backup, self.g0, self.g1, self.g2, self.momentum = (tensors() for _ in range(6))
        self.square = [t.abs() for t in tensors()]
        self.u = base.Direction([self.g0, self.g1, self.g2], [[-0.03], [0.6], [0.4]])
        self.m = base.Direction(self.u.terms, [[1.0], [0.0], [0.0]])
        self.last = base.Direction([self.g2], [[1.0]])
        self.flat = torch.randn(numel(shapes), generator=generator, device=device).to(dtype)
        self.copied = torch.empty_like(self.flat)

    def references(self) -> list[Row]:
        """Return the references for the speed of memory: torch's copy, and a sum, which only reads."""
        return [
            Row("copy", "torch", 2, lambda: self.copied.copy_(self.flat)),
            Row("sum", "torch", 1, lambda: self.flat.sum()),
        ]

    def rows(self, name: str) -> list[Row]:
        """Return all primitives on the backend called ``name``."""
        backend: Any = Compiled() if name == "compile" else backends.select(name, self.device)
        n = len(self.params)
        option = [0] * n
        saved, unsaved = (base.Block(self.params, [0] * n, self.backup, state) for state in (True, False))

        def first() -> None:
            unsaved.saved = False
            backend.perturb(unsaved, self.g0, None, [1e-9], self.one, from_start=False)

        def fold() -> None:
            into = base.FoldInto(self.g0, self.g2, [1.0], [1e-9])
            backend.perturb(saved, self.g2, None, [1e-9], self.one, from_start=False, fold=into)

        def update(d: base.Direction) -> Callable[[], None]:
            row = (1e-9, 0.9, 0.0, 5e-4, 0.0, 0.0)
            return lambda: backend.update(saved, d, "sgd", [self.momentum], [row], [(0.0,)], option)

        def adamw() -> None:
            state = [self.momentum, self.square, [None] * n]
            row = (0.9, 0.999, 1e-8, 0.0, 1.0 - 1e-11, 0.0)
            backend.update(saved, self.u, "adam", state, [row], [(1e-9, 1.0)], option)

        far: Callable[[], None] = lambda: backend.perturb(  # noqa: E731
            saved, self.g1, self.g0, [1e-9], self.one, from_start=True
        )
        return [
            Row("norm g0", name, 1, lambda: backend.square_norm(saved, self.g0)),
            Row("back up, move", name, 4, first),
            Row("norm g1 − g0", name, 2, lambda: backend.square_norm(saved, self.g1, self.g0)),
            Row("move from start", name, 4, far),
            Row("move, fold", name, 5, fold),
            Row("inner products", name, 3, lambda: backend.inner_products(saved, self.u, self.m, 1)),
            Row("restore, SGD of 3", name, 7, update(self.u)),
            Row("restore, SGD of 1", name, 5, update(self.last)),
            Row("restore, AdamW of 3", name, 9, adamw),
            Row("restore", name, 2, lambda: backend.restore(saved)),
        ]


def time_in_turns(rows: list[Row], repeats: int, device: str) -> dict[str, str]:
    """Warm up, then run every row once per round. Drop rows that raise, and return their errors."""
    failed = {}
    for row in list(rows):
        try:
            row.run()
        except Exception as error:  # any error of torch.compile is a result here
            failed[f"{row.backend}: {row.name}"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            rows.remove(row)
    for _ in range(repeats):
        for row in rows:
            row.time(device)
    return failed


def primitives(shapes: Shapes, dtype: torch.dtype, names: list[str], repeats: int, device: str) -> list[dict[str, Any]]:
    """Return the measured rows of one model."""
    model = Primitives(shapes, dtype, device)
    rows = [*model.references(), *(row for name in names for row in model.rows(name))]
    failed = time_in_turns(rows, repeats, device)
    size = numel(shapes) * torch.finfo(dtype).bits // 8
    speed = {row.name: row.units * size / statistics.median(row.seconds) for row in rows[:2]}
    result: list[dict[str, Any]] = []
    for row in rows:
        seconds = statistics.median(row.seconds)
        moved = row.units * size
        result.append(
            {
                "primitive": row.name,
                "backend": row.backend,
                "units": row.units,
                "ms": 1e3 * seconds,
                "host_us": 1e6 * statistics.median(row.on_host),
                "gb_per_s": moved / seconds / 1e9,
                "to_copy": seconds * speed["copy"] / moved,
                "to_sum": seconds * speed["sum"] / moved,
            }
        )
    return result + [{"primitive": what, "failed": why} for what, why in failed.items()]


def steps(shapes: Shapes, names: list[str], repeats: int, device: str) -> list[dict[str, Any]]:
    """Measure whole steps without forward and backward, all in turns."""
    contenders = []
    for method, optimizer, dtype in STEPS:
        for name in ["torch"] if method == "torch" else [n for n in names if n != "compile"]:
            contenders.append(Contender(method, optimizer, shapes, device, dtype, name))
    measure(contenders, repeats)
    unit = {c.base: c.median for c in contenders if c.method == "torch"}
    fp32 = {(c.method, c.base, c.backend): c.median for c in contenders if c.dtype == torch.float32}
    return [
        {
            "step": f"{c.method} + {c.base}" if c.method != "torch" else f"torch {c.base}",
            "backend": c.backend,
            "dtype": str(c.dtype).removeprefix("torch."),
            "ms": c.median,
            "host_ms": statistics.median(c.host_ms),
            "to_torch": c.median / unit[c.base],
            "floor": FLOOR[c.base][c.method] / FLOOR[c.base]["torch"],
            "to_fp32": c.median / fp32[(c.method, c.base, c.backend)],
        }
        for c in contenders
    ]


def show(title: str, columns: dict[str, str], rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Print a table of the measurements, and the reasons of failures."""
    measured = [row for row in rows if "failed" not in row]
    failed = [f"{row['primitive']}: {row['failed']}" for row in rows if "failed" in row]
    Table(title, columns, measured, [*failed, conditions(facts)]).show()


def draw(models: dict[str, list[dict[str, Any]]], facts: dict[str, Any]) -> bytes:
    """Draw bars of GB/s by primitive and backend, one panel per model, with the run's copy as a line."""
    figure, axes = panels(len(models), 2.7, facts)
    for (model, rows), axis in zip(models.items(), axes, strict=True):
        measured = [row for row in rows if "failed" not in row and row["backend"] != "torch"]
        names = list(dict.fromkeys(row["primitive"] for row in measured))
        found = list(dict.fromkeys(row["backend"] for row in measured))
        for k, backend in enumerate(found):
            speed = {row["primitive"]: row["gb_per_s"] for row in measured if row["backend"] == backend}
            places = [i + (k - (len(found) - 1) / 2) * 0.8 / len(found) for i in range(len(names))]
            axis.bar(places, [speed.get(name, 0.0) for name in names], 0.8 / len(found), label=backend)
        copy = next(row["gb_per_s"] for row in rows if row["primitive"] == "copy")
        axis.axhline(copy, color="black", linewidth=1, linestyle="--", label="torch's copy")
        axis.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=10)
        axis.set_ylabel("GB/s")
        axis.set_title(model, loc="left", fontsize=11)
    axes[0].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=10, frameon=False)
    return png(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_common(parser, files=("json", "png"))
    parser.add_argument("--models", default="resnet50,vit_small,small,single", help="comma-separated (default: all)")
    parser.add_argument(
        "--backends", "--backend", default="eager,native", help=f"of {', '.join(BACKENDS)} (default: eager,native)"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the elements, to check that it works")
    arguments = options.parse(parser, argv)
    names = options.listed(parser, "--backends", arguments.backends, BACKENDS)
    models = options.listed(parser, "--models", arguments.models, MODELS)
    if "triton" in names and arguments.device == "cpu":
        parser.error("--backends triton needs --device cuda: on a CPU Triton only interprets its kernels")
    torch.set_num_threads(arguments.threads)
    facts = machine(arguments.device)
    shapes = {model: quick(MODELS[model]()) if arguments.quick else MODELS[model]() for model in models}
    primitive_columns, step_columns = (
        {key: name for key, name in columns.items() if arguments.device != "cpu" or not key.startswith("host")}
        for columns in (PRIMITIVE_COLUMNS, STEP_COLUMNS)
    )
    found = {}
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    with torch.no_grad():
        for model in models:
            found[model] = primitives(shapes[model], dtype, names, arguments.repeats, arguments.device)
            size = f"{len(shapes[model])} tensors, {numel(shapes[model]) / 1e6:.1f} M elements"
            show(f"{model}: {size}, {arguments.dtype}", primitive_columns, found[model], facts)
    whole = steps(shapes[models[0]], names, arguments.repeats, arguments.device)
    show(f"whole steps without forward and backward: {models[0]}", step_columns, whole, facts)
    write_json(arguments.json, {**facts, "dtype": arguments.dtype, "primitives": found, "steps": whole})
    if arguments.png:
        arguments.png.write_bytes(draw(found, facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
