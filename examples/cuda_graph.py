"""A whole step of GAM, four forward and backward passes and the update, as one CUDA graph.

A graph repeats the device's work during the capture, with the addresses and numbers of that time. So

- the optimizer first runs a few times on a side stream, so that its momentum exists (PyTorch's rule for all graphs);
- ``replay_rng=False``: the random state of the host is not part of a graph;
- ``on_nonfinite="ignore"``: to raise an error, the host would have to look at the norms;
- the learning rate and the radii are those at the capture; to change one, capture again;
- Adam and AdamW count their steps on the host: they need ``capturable=True``;
- parameters and optimizer must live as long as the graph, which works on their memory.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gam_fast


def seconds_of(call: Callable[[], object], count: int = 100) -> float:
    """Return the mean time of a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def main() -> int:
    """Capture a step of GAM, and replay it."""
    if not torch.cuda.is_available():
        print("this example needs a CUDA GPU, and a CUDA build of torch that sees it")
        return 0
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 10)).cuda()
    optimizer = gam_fast.GAM(
        model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, replay_rng=False, on_nonfinite="ignore"
    )
    inputs, labels = torch.randn(128, 64, device="cuda"), torch.randint(10, (128,), device="cuda")

    def closure() -> Tensor:
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step(closure)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = optimizer.step(closure)
    eager, replayed = (seconds_of(call) for call in (lambda: optimizer.step(closure), graph.replay))
    print(f"a step takes {1e3 * eager:.2f} ms, its graph {1e3 * replayed:.2f} ms: {eager / replayed:.1f} times as fast")
    for step in range(200):
        inputs.normal_()  # new data goes into the same memory
        labels.copy_(inputs[:, :10].argmax(1))
        graph.replay()
        if step % 50 == 0:
            print(f"step {step}: loss {float(loss):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
