"""Time of a step without forward and backward, for each method, against torch's own step of the base optimizer.

The closure provides fresh gradients, and its own time is subtracted: the rest is the optimizer's work between the
passes. On a GPU it is the device's time, by events, with the host's time separately. Methods take turns within one run.
The table gives medians and their ratio to torch's step, next to the ratio of the bytes of a fully fused step.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch

from . import options
from .contenders import FLOOR, Contender, machine, measure
from .models import MODELS, numel, quick
from .peers import PEERS
from .report import Table, conditions, write_json


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_common(parser)
    options.add_backend(parser)
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "float64", "bfloat16"), help="default: float32"
    )
    parser.add_argument("--base", default="SGD", choices=tuple(FLOOR), help="base optimizer (default: SGD)")
    parser.add_argument("--peers", default="", help=f"also time these alternatives, of {', '.join(PEERS)}, with commas")
    parser.add_argument("--model", default="resnet50", choices=tuple(MODELS), help="default: resnet50")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the elements, to check that it works")
    arguments = options.parse(parser, argv)
    torch.set_num_threads(arguments.threads)
    peers = options.listed(parser, "--peers", arguments.peers, PEERS) if arguments.peers else []
    missing = {key: reason for key in peers if (reason := PEERS[key].missing())}
    notes = [f"{PEERS[key].name} is left out: {reason}" for key, reason in missing.items()]
    shapes = MODELS[arguments.model]()
    if arguments.quick:
        shapes = quick(shapes)
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    floor = FLOOR[arguments.base]
    contenders = [
        Contender(method, arguments.base, shapes, arguments.device, dtype, arguments.backend)
        for method in (*floor, *(key for key in peers if key not in missing))
    ]
    measure(contenders, arguments.repeats)
    unit = contenders[0].median
    rows = [
        {
            "method": PEERS[c.method].name if c.method in PEERS else c.method,
            "ms": c.median,
            "host_ms": statistics.median(c.host_ms),
            "ratio": c.median / unit,
            "floor": floor[PEERS[c.method].method if c.method in PEERS else c.method] / floor["torch"],
        }
        for c in contenders
    ]
    facts = machine(arguments.device)
    size = f"{len(shapes)} tensors, {numel(shapes) / 1e6:.1f} M elements"
    columns = {"method": "method", "ms": "ms", "host_ms": "host, ms", "ratio": "÷ torch", "floor": "floor"}
    if arguments.device == "cpu":
        del columns["host_ms"]  # the same as the device's
    Table(f"{arguments.base}: {size}, {arguments.dtype}", columns, rows, [*notes, conditions(facts)]).show()
    figures = {**facts, "base": arguments.base, "dtype": arguments.dtype, "elements": numel(shapes), "rows": rows}
    write_json(arguments.json, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
