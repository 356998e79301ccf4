"""The CUDA core on the CPU: compiled by a plain C++ compiler, its kernels run by the emulator in tests/cuda_emulator.

CPU tensors stand in for CUDA tensors. All but ``csrc/cuda/device.cpp``, which calls CUDA itself, is the code that runs
on a GPU: checks, tables, launches, kernels.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from gam_fast import backends, sums

ROOT = Path(__file__).parent.parent
EMULATOR = ROOT / "tests" / "cuda_emulator"


@functools.cache
def core() -> ModuleType:
    """The module, built in ``build/`` when a source has changed."""
    sanitize = bool(os.environ.get("GAM_FAST_SANITIZED"))
    flags = ["-O1", "-mfma", "-ffp-contract=off", "-fvisibility=hidden"]
    flags += ["-Wall", "-Wno-unknown-pragmas"]
    flags += ["-DGAM_CUDA", "-DGAM_EMULATED", f"-I{EMULATOR}"]
    if sanitize:
        flags += [
            f"-include{EMULATOR}/few_dtypes.h",
            "-g1",
            "-fsanitize=address,undefined",
            "-fno-sanitize=vptr",
            "-fno-sanitize-recover=all",
        ]
    folder = ROOT / "build" / f"emulated-{torch.__version__}{'-sanitized' if sanitize else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    module: ModuleType = cpp_extension.load(
        name="gam_fast_emulated",
        sources=[str(EMULATOR / f"{name}.cpp") for name in ("host", "moves", "sums", "updates")],
        extra_cflags=flags,
        extra_ldflags=["-fsanitize=address,undefined"] if sanitize else [],
        build_directory=str(folder),
        with_cuda=False,
    )
    return module


@functools.cache
def backend_class() -> Any:
    """The native backend on emulated CUDA."""
    from gam_fast.backends.native import NativeBackend

    class EmulatedBackend(NativeBackend):
        core = core()

        def _plan_for(self, leaves):
            found = super()._plan_for(leaves)
            self._device = leaves.params[0].device  # as on a GPU, which takes sums in its own memory
            return found

    return EmulatedBackend


def backend() -> Any:
    return backend_class()()


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every optimizer work on emulated CUDA, and treat the CPU as a device that it must not wait for."""
    classes = {**backends._classes(), "native": backend_class()}
    monkeypatch.setattr(backends, "_classes", lambda: classes)
    monkeypatch.setattr(sums, "reads_are_free", lambda device: False)
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "native")
