"""Parameter shapes of the models that the benchmarks represent; no model is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

Shapes: TypeAlias = "list[tuple[int, ...]]"


def resnet50() -> Shapes:
    """Return the 161 parameters of torchvision's resnet50, 25.6 million elements."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, width_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, width_in, 1, 1), (4 * width,), (4 * width,)]
            width_in = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vit_small() -> Shapes:
    """Return the 152 parameters of a ViT-S/16 for 224 x 224 images and 1000 classes, 22.1 million elements."""
    width = 384
    shapes: Shapes = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    for _ in range(12):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [*shapes, (width,), (width,), (1000, width), (1000,)]


def small() -> Shapes:
    """Return 300 small tensors, 0.4 million elements, which show the cost of a call besides its bytes."""
    return [shape for _ in range(100) for shape in ((64, 64), (64,), (64,))]


def single() -> Shapes:
    """Return one tensor of 100 million elements."""
    return [(100_000_000,)]


def gpt2() -> Shapes:
    """Return the 148 parameters of GPT-2 small, whose head shares the embedding, 124.4 million elements."""
    width = 768
    shapes: Shapes = [(50257, width), (1024, width)]
    for _ in range(12):
        shapes += [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [*shapes, (width,), (width,)]


def many() -> Shapes:
    """Return 10,000 vectors of 64 elements."""
    return [(64,)] * 10_000


MODELS: dict[str, Callable[[], Shapes]] = {f.__name__: f for f in (resnet50, vit_small, gpt2, small, many, single)}


def numel(shapes: Shapes) -> int:
    """Return the number of elements of all tensors together."""
    return sum(math.prod(shape) for shape in shapes)


def like_resnet(elements: int, tensors: int = 100) -> Shapes:
    """Return ``tensors`` vectors with ``elements`` elements in total, in the size ratios of a ResNet-50's tensors.

    Every vector has at least one element, and the largest takes the remainder of rounding.
    """
    source = resnet50()
    shares = [math.prod(source[i * len(source) // tensors]) for i in range(tensors)]
    sizes = [max(1, share * elements // sum(shares)) for share in shares]
    sizes[shares.index(max(shares))] += elements - sum(sizes)
    return [(size,) for size in sizes]


def quick(shapes: Shapes) -> Shapes:
    """Return shapes with about a sixteenth of the elements in as many tensors, to check that a benchmark works."""
    return [tuple(max(1, n // 4) if i < 2 else n for i, n in enumerate(shape)) for shape in shapes]
