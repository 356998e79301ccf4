"""Count the Python calls of one step, a measure of its overhead where times would be noise.

python -m tools.calls --method GAM --tensors 10
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import gam_fast


def count(optimizer: gam_fast.SharpnessAwareOptimizer, warm_up: int = 5) -> Counter[str]:
    """Return how often each Python function is called in a step, by file and name, for the step with the fewest calls.

    Several steps are counted, because a step checks the generators of Python and NumPy only now and then. The loop's
    body sets gradients without a backward pass.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    calls: Counter[str] = Counter()

    def step() -> None:
        for _ in optimizer.passes():
            for param in params:
                param.grad = torch.zeros(8)

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1

    for _ in range(warm_up):
        step()
    found = []
    for _ in range(7):
        calls.clear()
        sys.setprofile(note)
        try:
            step()
        finally:
            sys.setprofile(None)
        del calls[f"{Path(__file__).name}:step"]
        found.append(calls.copy())
    return min(found, key=Counter.total)


def of(method: str, tensors: int, backend: str = "auto") -> Counter[str]:
    """Return the calls of a step of ``method`` with SGD over ``tensors`` tensors of 8 elements."""
    params = [torch.nn.Parameter(torch.randn(8)) for _ in range(tensors)]
    optimizer = getattr(gam_fast, method)(params, torch.optim.SGD, lr=1e-4, momentum=0.9, backend=backend)
    return count(optimizer)


def main() -> None:
    """Print the calls from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="GAM")
    parser.add_argument("--tensors", type=int, default=10)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    calls = of(options.method, options.tensors, options.backend)
    for name, times in sorted(calls.items(), key=lambda item: (-item[1], item[0])):
        print(f"{times:4} {name}")
    print(f"{calls.total():4} Python calls of {len(calls)} functions in a step of {options.method}")


if __name__ == "__main__":
    main()
