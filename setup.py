"""Build script; everything static is in pyproject.toml. Here: whether, and from what, the compiled core is built."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

BUILD_MODES = ("auto", "cpu", "cuda", "none")
HINT = "install torch, ninja, setuptools and a C++17 compiler, then: pip install --no-build-isolation ."


def build_mode() -> str:
    """``GAM_FAST_BUILD``: ``cpu`` or fail, ``none``, or ``auto``, which is ``cpu`` where it can be built."""
    mode = os.environ.get("GAM_FAST_BUILD", "auto")
    if mode not in BUILD_MODES:
        raise SystemExit(f"GAM_FAST_BUILD must be one of {', '.join(BUILD_MODES)}, got {mode!r}")
    if mode == "cuda":
        raise SystemExit("GAM_FAST_BUILD=cuda: this version has no CUDA core yet; use auto, cpu or none")
    return mode


def say(text: str) -> None:
    print(f"gam_fast: {text}", file=sys.stderr, flush=True)


def remove_core() -> None:
    """Remove a core of before from the source tree, where an editable installation would find it."""
    for path in Path("gam_fast").glob("_C.*"):
        if path.suffix in (".so", ".pyd"):
            path.unlink()


def flags() -> tuple[list[str], list[str]]:
    """Arguments of the compiler and of the linker. Formulas round as they are written: no contraction, no fast-math."""
    if os.name == "nt":
        return ["/O2", "/openmp", "/fp:precise"], []
    if os.environ.get("GAM_FAST_SANITIZE"):
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        sanitize += ["-O1", "-g", "-fno-omit-frame-pointer", "-fopenmp"]
        return [*sanitize, "-ffp-contract=off"], sanitize
    compile_args = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    return compile_args + openmp, openmp


def core(mode: str) -> dict[str, Any]:
    """The arguments of ``setup`` that build ``gam_fast._C``; none where that is not wanted or not possible."""
    if mode == "none":
        say("GAM_FAST_BUILD=none: the compiled core is left out")
        if "--inplace" in sys.argv:
            remove_core()
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if mode == "cpu":
            raise SystemExit(f"GAM_FAST_BUILD=cpu: torch cannot be imported here ({error}); {HINT}") from error
        say(f"the compiled core is left out, because torch cannot be imported here ({error}); {HINT}")
        return {}

    class Build(BuildExtension):
        """In ``auto``, a core that cannot be compiled is left out. One built for another torch is built anew."""

        def run(self) -> None:
            stamp, built_for = Path(self.build_temp, "built-for"), f"{torch.__version__} {sys.version}"
            if not stamp.exists() or stamp.read_text() != built_for:
                self.force = True
                shutil.rmtree(self.build_temp, ignore_errors=True)
            super().run()
            if self.extensions:
                stamp.parent.mkdir(parents=True, exist_ok=True)
                stamp.write_text(built_for)

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if mode == "cpu":
                    raise
                say(f"the compiled core is left out, because it could not be built ({error}); {HINT}")
                self.extensions.clear()
                remove_core()
            else:
                say("the compiled core is built, for the CPU")

    sources = sorted(str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp"))
    headers = sorted(str(path) for kind in ("*.h", "*.inl") for path in Path("csrc").rglob(kind))
    compile_args, link_args = flags()
    extension = CppExtension(
        "gam_fast._C", sources, depends=headers, extra_compile_args=compile_args, extra_link_args=link_args
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


setup(**core(build_mode()))
