"""The shape of the programs of a kernel: how many elements at once, by how many threads.

By default every device gets :data:`DEFAULT`. With ``GAM_FAST_TRITON_TUNE=1`` in the environment the first step on a
kind of GPU measures the few :data:`CANDIDATES`, on memory of its own, and the fastest is kept, for the process and in
Triton's cache on disk. Sums are added up in one shape whatever happens, so that results do not depend on it. Kernels
that write in place are not given to ``triton.autotune``, which runs a kernel several times on its real arguments.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT_VARIABLE = "GAM_FAST_TRITON_TUNE"


@dataclass(frozen=True)
class Configuration:
    """``block`` elements of each array at once, by ``threads`` threads of a program, whole warps of any GPU."""

    block: int
    threads: int


DEFAULT = Configuration(1024, 128)
"""16 bytes of each 16-bit array for a thread, the widest access there is, and two such of fp32: of the five to nine
arrays of an update that is enough under way to keep memory busy, and takes 60 to 130 registers."""

CANDIDATES = (DEFAULT, Configuration(2048, 128), Configuration(2048, 256), Configuration(4096, 256))

MARGIN = 0.03
"""By how much of the default's time another shape must be faster."""

_FILE = "gam_fast.json"
_chosen: dict[str, Configuration] = {}


def configuration_of(device: torch.device, seconds: Callable[[torch.device, Configuration], float]) -> Configuration:
    """The shape for a device; where it is measured, ``seconds`` tells how long a step takes with one.

    >>> configuration_of(torch.device("cpu"), lambda device, shape: 1.0)
    Configuration(block=1024, threads=128)
    """
    if device.type != "cuda" or os.environ.get(ENVIRONMENT_VARIABLE) != "1":
        return DEFAULT
    kind = torch.cuda.get_device_name(device)
    if kind not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return DEFAULT
        _chosen[kind] = _stored(kind) or _fastest(kind, device, seconds)
    return _chosen[kind]


def _fastest(kind: str, device: torch.device, seconds: Callable[[torch.device, Configuration], float]) -> Configuration:
    """Measures them all; the default, unless another is faster by more than chance, and where that cannot be known."""
    found = {shape: _measured(device, shape, seconds) for shape in CANDIDATES}
    fastest = min(CANDIDATES, key=lambda shape: found[shape])
    fastest = fastest if found[fastest] < (1.0 - MARGIN) * found[DEFAULT] else DEFAULT
    with contextlib.suppress(OSError):  # the next process measures again
        _cache(kind).put(json.dumps(asdict(fastest)), _FILE, binary=False)
    return fastest


def _measured(
    device: torch.device, shape: Configuration, seconds: Callable[[torch.device, Configuration], float]
) -> float:
    try:
        return seconds(device, shape)
    except Exception:  # too little memory, or more registers than there are
        return math.inf


def _stored(kind: str) -> Configuration | None:
    """What an earlier process found; ``None`` where there is nothing, or nothing that can be read."""
    try:
        path = _cache(kind).get_file(_FILE)
        if path is None:
            return None
        found = Configuration(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return None
    return found if found in CANDIDATES else None


def _cache(kind: str) -> Any:
    """Where Triton keeps what belongs to this kind of GPU and these candidates."""
    from triton.runtime.cache import get_cache_manager

    return get_cache_manager(hashlib.sha256(f"gam_fast {kind} {CANDIDATES}".encode()).hexdigest())
