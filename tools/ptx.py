"""Write the PTX of every CUDA kernel, and a JSON file with their names and the layout of their arguments.

This needs nvcc and a C++ compiler, but no GPU and no torch. `make ptx` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def arguments_of(folder: Path) -> dict[str, Any]:
    """Return for each structure its size in bytes, and for each field its offset and size."""
    program = folder / "layouts"
    source = str(ROOT / "tools" / "layouts.cpp")
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-Wno-invalid-offsetof", source, "-o", str(program)]
    subprocess.run(command, check=True)
    text = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    program.unlink()
    layouts: dict[str, Any] = json.loads(text)
    return layouts


def main() -> None:
    """Write the files from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="90", help="a virtual architecture, such as 90")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "ptx")
    options = parser.parse_args()
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        raise SystemExit("nvcc is not found: install a CUDA toolkit and set CUDA_HOME to its folder")
    options.folder.mkdir(parents=True, exist_ok=True)
    kernels = {}
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        target = options.folder / f"{source.stem}.ptx"
        flags = ["-std=c++17", "-O3", "--fmad=false", f"-arch=compute_{options.architecture}", "-ptx"]
        subprocess.run([nvcc, *flags, str(source), "-o", str(target)], check=True)
        for name in re.findall(r"\.visible \.entry (\w+)\(", target.read_text(encoding="utf-8")):
            plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
            kernels[name] = {
                "file": target.name,
                "kernel": plain.split("(")[0].removeprefix("void "),
                "arguments": re.search(r"(\w+Arguments)\)$", plain)[1],  # type: ignore[index]
            }
    text = (ROOT / "csrc" / "cuda" / "table.h").read_text(encoding="utf-8")
    constants = {name: int(value) for name, value in re.findall(r"int (k\w+) = (\d+);", text)}
    summary = {"constants": constants, "structures": arguments_of(options.folder), "kernels": kernels}
    (options.folder / "kernels.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"{len(kernels)} kernels for compute_{options.architecture}: {options.folder}")


if __name__ == "__main__":
    main()
