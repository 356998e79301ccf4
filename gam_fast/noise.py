r"""Gaussian noise as a perturbation: a normal number for each element, times :math:`ρ ‖θ_l‖ / \sqrt{n_l}`.

Here θ_l is the tensor of the element, with n_l elements. A separate generator draws the numbers on the parameters'
device, in chunks of scratch memory. They depend on the seed and on the number of the step, which is in ``param_groups``
(``flat_draws``), and so in every ``state_dict``. Processes that hold the same parameters draw the same numbers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .backends.base import Block
from .backends.eager import chunks, copy_bits
from .capture import refuse_to_look
from .distributed import Layout
from .parameters import StepParameters

DRAWS = "flat_draws"
"""The key in ``param_groups`` for the number of steps that have drawn noise."""


def add_noise(blocks: StepParameters, radius: Sequence[float], group: Mapping[str, Any]) -> dict[str, float]:
    """Save θ and add this step's noise to the perturbed parameters.

    Args:
        blocks: the parameters.
        radius: ρ by group.
        group: the first group, with the seed and the number of the step.

    Returns:
        The values that the groups keep when the step is taken.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would repeat the noise of one step.
    """
    refuse_to_look(["noise, which differs in each step"], blocks.devices)
    draws = int(group.get(DRAWS, 0))
    seed = random.Random(f"{group.get('seed', 0)} {draws}").getrandbits(63)
    generators: dict[tuple[torch.device, Layout | None], torch.Generator] = {}
    for block in blocks.all:
        if not block.perturbed:
            continue
        key = block.params[0].device, block.layout
        if key not in generators:
            layouts = {layout: None for _, layout in generators}  # in the same order on all processes
            generators[key] = torch.Generator(key[0]).manual_seed(_seed_of(block.layout, len(layouts), seed))
        wholes: Any = [owner.detach() for owner in block.owners]
        sizes: Any = [whole.norm(dtype=torch.promote_types(whole.dtype, torch.float32)) for whole in wholes]
        if block.layout is not None:
            sizes = [size.full_tensor() for size in sizes]
        block.backup = blocks.allocate_backup(block)
        copy_bits(list(block.backup), list(block.params))
        block.saved = True
        factors = [radius[g] / max(whole.numel(), 1) ** 0.5 for whole, g in zip(wholes, block.group, strict=True)]
        apart = Block(list(block.params), block.group, vectors=block.vectors)  # with its own chunks
        for chunk in chunks(apart):
            chunk.arena.reset()
            flat, noise = chunk.scratch()
            flat.normal_(generator=generators[key])
            torch._foreach_mul_(noise, [factors[piece.leaf] for piece in chunk.pieces])
            torch._foreach_mul_(noise, [sizes[piece.leaf].to(chunk.opmath) for piece in chunk.pieces])
            params = chunk.open(apart.params)
            torch._foreach_add_(params, noise)
            chunk.close(apart.params, params)
    return {DRAWS: draws + 1}


def _seed_of(layout: Layout | None, number: int, seed: int) -> int:
    """Return the seed for elements of the ``number``-th layout: each part has its own, and all copies have the same."""
    if layout is None:
        return seed
    sharded = [dim for dim, is_spread in enumerate(layout.sharded) if is_spread]
    part = [layout.mesh.get_local_rank(dim) for dim in sharded]
    return random.Random(f"{seed} {number} {part}").getrandbits(63)
