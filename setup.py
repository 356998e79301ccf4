"""Build the compiled core, if possible. All static metadata are in pyproject.toml."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

BUILD_MODES = ("auto", "cpu", "cuda", "none")
HINT = "install torch, ninja, setuptools and a C++17 compiler, then: pip install --no-build-isolation ."

# Default of TORCH_CUDA_ARCH_LIST: code for these architectures, which later GPUs of the same major version run too, and
# PTX, which newer ones translate. Each entry has the first version of nvcc that supports it.
CUDA_ARCHITECTURES = [("8.0+PTX", (11, 0)), ("9.0", (11, 8)), ("10.0", (12, 8)), ("12.0+PTX", (12, 8))]


def build_mode() -> str:
    """Return ``GAM_FAST_BUILD``: ``cpu`` and ``cuda`` must succeed, ``none``, or ``auto``: build what is possible."""
    mode = os.environ.get("GAM_FAST_BUILD", "auto")
    if mode not in BUILD_MODES:
        raise SystemExit(f"GAM_FAST_BUILD must be one of {', '.join(BUILD_MODES)}, got {mode!r}")
    return mode


def say(text: str) -> None:
    """Print a line to stderr."""
    print(f"gam_fast: {text}", file=sys.stderr, flush=True)


def remove_core() -> None:
    """Remove an older core from the source tree, where an editable installation would find it."""
    for path in Path("gam_fast").glob("_C.*"):
        if path.suffix in (".so", ".pyd"):
            path.unlink()


def cuda_home() -> str | None:
    """Return the CUDA toolkit: ``CUDA_HOME``, or the folder of the nvcc on the path, which may be a wrapper script."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return os.environ[name]
    found = []
    if nvcc := shutil.which("nvcc"):
        found.append(Path(nvcc).resolve().parent.parent)
        text = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ _?TOP=(.+)$", text, re.MULTILINE):
            found.append(Path(top[1].strip()).resolve())
    found.append(Path("/usr/local/cuda"))
    headers = ("include/cuda_runtime.h", "targets/*/include/cuda_runtime.h")  # the second path is conda's
    return next((str(home) for home in found if any(any(home.glob(header)) for header in headers)), None)


def nvcc_version(home: str | None) -> tuple[int, int] | None:
    """Return the version of the compiler in a CUDA toolkit."""
    if home is None:
        return None
    try:
        text = subprocess.run([str(Path(home, "bin", "nvcc")), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def why_no_cuda() -> str | None:
    """Return what is missing for the CUDA part of the core, or None."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    version = nvcc_version(os.environ.get("CUDA_HOME"))
    if version is None:
        return "nvcc is not found: install a CUDA toolkit and set CUDA_HOME to its folder"
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return f"nvcc is of CUDA {version[0]}.{version[1]}, but torch of CUDA {torch.version.cuda}"
    return None


def architectures() -> str:
    """Return ``TORCH_CUDA_ARCH_LIST``, or the default architectures that nvcc supports."""
    version = nvcc_version(os.environ.get("CUDA_HOME"))
    assert version is not None
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or (
        ";".join(name for name, since in CUDA_ARCHITECTURES if version >= since)
    )


def cxx_flags() -> tuple[list[str], list[str]]:
    """Return compiler and linker flags. Formulas round as they are written: no contraction, no fast-math."""
    if os.name == "nt":
        return ["/O2", "/openmp", "/fp:precise", "/bigobj"], []
    if os.environ.get("GAM_FAST_SANITIZE"):
        sanitize = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
        sanitize += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fopenmp"]
        return [*sanitize, "-ffp-contract=off"], sanitize
    compile_args = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
    compile_args.append("-g0")  # Python's own flags have -g, which doubles the time
    openmp = [] if platform.system() == "Darwin" else ["-fopenmp"]
    # A compiler that links libstdc++ statically would export it: numbers in messages then crash, in torch's own copy.
    private = ["-Wl,--exclude-libs,ALL"] if platform.system() == "Linux" else []
    return compile_args + openmp, openmp + private


NVCC_FLAGS = ["-O3", "--fmad=false"]


def core(mode: str) -> dict[str, Any]:
    """Return the arguments of ``setup`` that build ``gam_fast._C``; empty if it is not wanted or not possible."""
    if mode == "none":
        say("GAM_FAST_BUILD=none: the compiled core is left out")
        if "--inplace" in sys.argv:
            remove_core()
        return {}
    if home := cuda_home():
        os.environ["CUDA_HOME"] = home  # torch's own guess would be the parent of a wrapper script
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if mode != "auto":
            raise SystemExit(f"GAM_FAST_BUILD={mode}: torch cannot be imported here ({error}); {HINT}") from error
        say(f"the compiled core is left out, because torch cannot be imported here ({error}); {HINT}")
        return {}
    reason = why_no_cuda()
    if mode == "cuda" and reason:
        raise SystemExit(f"GAM_FAST_BUILD=cuda: {reason}")
    with_cuda = mode == "cuda" or (mode == "auto" and reason is None)
    if with_cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    architecture_list = os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else "none"

    class Build(BuildExtension):
        """Leave out, in ``auto``, a core that cannot be compiled; rebuild one that was built for another torch."""

        def run(self) -> None:
            stamp, built_for = (
                Path(self.build_temp, "built-for"),
                f"{torch.__version__} {sys.version} {architecture_list}",
            )
            if not stamp.exists() or stamp.read_text() != built_for:
                self.force = True
                shutil.rmtree(self.build_temp, ignore_errors=True)
            super().run()
            if self.extensions:
                stamp.parent.mkdir(parents=True, exist_ok=True)
                stamp.write_text(built_for)

        def build_extensions(self) -> None:
            attempts = [with_cuda, False] if mode == "auto" and with_cuda else [with_cuda]
            for cuda in attempts:
                made = extension(cuda)
                for name in ("sources", "define_macros", "include_dirs", "library_dirs", "libraries", "language"):
                    setattr(self.extensions[0], name, getattr(made, name))
                self.extensions[0].extra_compile_args = made.extra_compile_args
                target = f"the CPU and CUDA ({os.environ['TORCH_CUDA_ARCH_LIST']})" if cuda else "the CPU"
                try:
                    super().build_extensions()
                except Exception as error:
                    if mode != "auto":
                        raise
                    say(f"the compiled core could not be built for {target} ({error})")
                else:
                    say(f"the compiled core is built, for {target}")
                    if mode == "auto" and reason and torch.version.cuda:
                        say(f"not for CUDA: {reason}")
                    return
            say(f"the compiled core is left out; {HINT}")
            self.extensions.clear()
            remove_core()

    def extension(cuda: bool) -> Any:
        kinds = ["core.cpp", "cpu/dispatch.cpp", "cpu/isa_*.cpp"] + ["cuda/*.cu"] * cuda
        sources = [str(path) for kind in kinds for path in Path("csrc").glob(kind)]
        compile_args, link_args = cxx_flags()
        macros = (
            [("GAM_CUDA", None), ("GAM_CUDA_ARCHITECTURES", f'"{os.environ["TORCH_CUDA_ARCH_LIST"]}"')] if cuda else []
        )
        make: Any = CUDAExtension if cuda else CppExtension
        return make(
            "gam_fast._C",
            sorted(sources),
            depends=sorted(str(path) for path in Path("csrc").rglob("*.*")),
            define_macros=macros,
            extra_compile_args={"cxx": compile_args, "nvcc": NVCC_FLAGS},
            extra_link_args=link_args,
        )

    return {"ext_modules": [extension(with_cuda)], "cmdclass": {"build_ext": Build}}


setup(**core(build_mode()))
