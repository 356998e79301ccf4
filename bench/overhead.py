"""Time of a step without forward and backward, for each method, against torch's own step of the base optimizer.

The closure hands over fresh gradients, and its own time is taken off: what remains is what the optimizer does between
the passes. Methods take turns within one run; the table gives medians and their ratio to torch's step, beside the ratio
of bytes that a fully fused step would move.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from .contenders import FLOOR, Contender, machine, measure
from .models import MODELS, numel, quick


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float64", "bfloat16"), help="default: float32"
    )
    parser.add_argument("--base", default="SGD", choices=tuple(FLOOR), help="base optimizer (default: SGD)")
    parser.add_argument("--model", default="resnet50", choices=tuple(MODELS), help="default: resnet50")
    parser.add_argument("--backend", default="auto", help="backend of gam_fast (default: auto)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=9, help="rounds; medians are taken over them (default: 9)")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the elements: to see that it works")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to PATH")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 7:
        parser.error(f"--repeats must be at least 7 for a median to mean something, got {arguments.repeats}")
    torch.set_num_threads(arguments.threads)
    shapes = MODELS[arguments.model]()
    if arguments.quick:
        shapes = quick(shapes)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    floor = FLOOR[arguments.base]
    contenders = [
        Contender(method, arguments.base, shapes, arguments.device, dtype, arguments.backend) for method in floor
    ]
    measure(contenders, arguments.repeats)
    unit = contenders[0].median
    rows = [
        {"method": c.method, "ms": c.median, "ratio": c.median / unit, "floor": floor[c.method] / floor["torch"]}
        for c in contenders
    ]
    facts = machine(arguments.device)
    size = f"{len(shapes)} tensors, {numel(shapes) / 1e6:.1f} M elements"
    print(f"{size}, {arguments.dtype}, {facts['device']}, {arguments.threads} threads, {arguments.base}")
    print(f"{'method':<8}{'ms':>10}{'÷ torch':>10}{'floor':>10}")
    for row in rows:
        print(f"{row['method']:<8}{row['ms']:>10.2f}{row['ratio']:>10.2f}{row['floor']:>10.2f}")
    if arguments.json:
        figures = {**facts, "base": arguments.base, "dtype": arguments.dtype, "elements": numel(shapes), "rows": rows}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
