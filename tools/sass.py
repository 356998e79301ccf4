"""Inspect the compiled CUDA kernels of the core: registers, spills, vector accesses, occupancy.

This needs no GPU, but a core built with GAM_FAST_BUILD=cuda, cuobjdump (of a CUDA toolkit or the triton package) and
the toolkit's cuda_occupancy.h. The figures are checked against ``tools/sass_limits.json``. `make sass` runs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMITS = ROOT / "tools" / "sass_limits.json"
LOADS = re.compile(r"LD[G]?\..*\b128\b")
STORES = re.compile(r"ST[G]?\..*\b128\b")
SPILLS = re.compile(r"LDL|STL")


@dataclass
class Kernel:
    """One kernel for one architecture."""

    architecture: str
    name: str
    variant: str  # the template arguments
    registers: int
    shared: int
    stack: int
    spills: int
    loads: int
    stores: int
    threads: int
    blocks: int = 0
    occupancy: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}<{self.variant}>"


def tool(name: str) -> str:
    """Return the path of a program of the CUDA toolkit, or of the triton package."""
    homes = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        homes.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin")
    found = next((str(home / name) for home in homes if (home / name).exists()), None) or shutil.which(name)
    if not found:
        raise SystemExit(f"{name} is not found: install a CUDA toolkit and set CUDA_HOME, or pip install triton")
    return found


def constant(name: str) -> int:
    """Return a constant of ``csrc/cuda/table.h``."""
    text = (ROOT / "csrc" / "cuda" / "table.h").read_text(encoding="utf-8")
    found = re.search(rf"int {name} = (\d+);", text)
    assert found, name
    return int(found[1])


def instructions_of(text: str) -> list[tuple[int, str]]:
    """Return address and text of each instruction in cuobjdump's output for one kernel."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    return [(int(address, 16), line.strip()) for address, line in found]


def loops(instructions: list[tuple[int, str]]) -> Iterator[list[str]]:
    """Yield the innermost loops: from the target of a backward branch to the branch, without another loop inside."""
    spans = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            spans.append((int(branch[1], 16), address))
    for start, end in spans:
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in spans):
            yield [text for address, text in instructions if start <= address <= end]


def kernels(library: str, architecture: str, cuobjdump: str) -> list[Kernel]:
    """Return all kernels of the library for one architecture."""

    def output(option: str) -> str:
        command = [cuobjdump, "-arch", architecture, option, library]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = {}
    for name, registers, stack, shared in re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", output("-res-usage")
    ):
        usage[name] = (int(registers), int(stack), int(shared))
    found = []
    for part in output("-sass").split("Function : ")[1:]:
        mangled = part.split()[0]
        instructions = instructions_of(part)
        plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
        head = re.match(r"(?:void )?gam::cuda::(\w+)_kernel<(.*?)>?\(", plain)
        if not head:
            continue
        hot = [loop for loop in loops(instructions) if any(LOADS.search(text) for text in loop)]
        registers, stack, shared = usage[mangled]
        found.append(
            Kernel(
                architecture,
                head[1],
                head[2].replace("gam::any::", ""),
                registers,
                # on newer GPUs cuobjdump adds the driver's share, which cuda_occupancy.h counts too
                shared - 1024 if shared >= 1024 and int(architecture[3:]) >= 90 else shared,
                stack,
                sum(bool(SPILLS.search(text)) for _, text in instructions),
                min((sum(bool(LOADS.search(text)) for text in loop) for loop in hot), default=0),
                min((sum(bool(STORES.search(text)) for text in loop) for loop in hot), default=0),
                constant("kTotalsBlock") if head[1] == "totals" else constant("kBlock"),
            )
        )
    return found


def add_occupancy(found: list[Kernel], cuda_home: str) -> None:
    """Compute the occupancy by a small program with the toolkit's own calculator."""
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder, "occupancy"))
        source = str(ROOT / "tools" / "occupancy.cpp")
        command = [os.environ.get("CXX", "c++"), "-std=c++17", f"-I{cuda_home}/include", source, "-o", program]
        subprocess.run(command, check=True)
        lines = []
        for kernel in found:
            number = kernel.architecture[3:]
            lines.append(f"{number[:-1]} {number[-1]} {kernel.registers} {kernel.shared} {kernel.threads}")
        text = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    for kernel, blocks in zip(found, text.split(), strict=True):
        threads = 2048 if kernel.architecture in ("sm_80", "sm_90", "sm_100") else 1536
        kernel.blocks = int(blocks)
        kernel.occupancy = kernel.blocks * kernel.threads / threads


def check(found: list[Kernel], limits: dict[str, dict[str, float]]) -> list[str]:
    """Return a message for each exceeded limit."""
    wrong = []
    for kernel in found:
        limit = limits[kernel.name]
        where = f"{kernel.architecture} {kernel}"
        if kernel.spills or kernel.stack:
            wrong.append(f"{where}: {kernel.spills} spills, {kernel.stack} bytes of stack")
        if kernel.registers > limit["registers"]:
            wrong.append(f"{where}: {kernel.registers} registers, limit {limit['registers']}")
        if kernel.occupancy < limit["occupancy"]:
            wrong.append(f"{where}: occupancy {kernel.occupancy:.2f}, limit {limit['occupancy']}")
        if kernel.loads < limit["loads"] or kernel.stores < limit["stores"]:
            wrong.append(f"{where}: {kernel.loads} loads and {kernel.stores} stores of 128 bits in a loop")
    return wrong


def table(found: list[Kernel], in_full: bool) -> Iterator[str]:
    """Yield a line for each kernel, or for each name with its worst figures."""
    columns = f"{'registers':>10}{'spills':>8}{'LDG.128':>9}{'STG.128':>9}{'blocks':>8}{'occupancy':>11}"
    yield f"{'':9}{'kernel':40}{columns}"
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in found:
        groups.setdefault((kernel.architecture, str(kernel) if in_full else kernel.name), []).append(kernel)
    for (architecture, title), group in groups.items():
        least = min(group, key=lambda kernel: kernel.occupancy)
        numbers = f"{max(k.registers for k in group):10}{sum(k.spills for k in group):8}"
        numbers += f"{min(k.loads for k in group):9}{min(k.stores for k in group):9}"
        yield f"{architecture:9}{title:40}{numbers}{least.blocks:8}{least.occupancy:11.0%}"


def main() -> None:
    """Print and check the figures from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", help="the compiled core; the one installed if not given")
    parser.add_argument("--all", action="store_true", help="a line for every kernel, not only the worst of each name")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    library = options.library
    if library is None:
        from gam_fast import _C

        if "cuda" not in _C.device_types():
            raise SystemExit("the core has no CUDA kernels: build it with GAM_FAST_BUILD=cuda")
        library = _C.__file__
    cuda_home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if not Path(cuda_home, "include", "cuda_occupancy.h").exists():
        raise SystemExit("cuda_occupancy.h is not found: set CUDA_HOME to the folder of a CUDA toolkit")
    cuobjdump = tool("cuobjdump")
    listing = subprocess.run([cuobjdump, "-lelf", library], capture_output=True, text=True, check=True).stdout
    architectures = sorted(set(re.findall(r"sm_\d+", listing)), key=lambda name: int(name[3:]))
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda name: kernels(library, name, cuobjdump), architectures)
    found = [kernel for part in parts for kernel in part]
    add_occupancy(found, cuda_home)
    print("\n".join(table(found, options.all)))
    if options.json:
        options.json.write_text(json.dumps([asdict(kernel) for kernel in found], indent=1) + "\n", encoding="utf-8")
    wrong = check(found, json.loads(LIMITS.read_text(encoding="utf-8")))
    for line in wrong:
        print(f"over the limit: {line}", file=sys.stderr)
    print(f"{len(found)} kernels for {', '.join(architectures)}; {len(wrong)} over the limits of {LIMITS.name}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
