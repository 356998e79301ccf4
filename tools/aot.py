"""Compile the Triton kernels for absent GPUs, and check registers, local memory and vector accesses.

Each kernel is compiled ahead of time for every dtype. The loop over whole blocks must not use local memory, and must
read and write 16 bytes at once, as many times as there are arrays. This needs Triton and no GPU, and a process without
``TRITON_INTERPRET=1``. `make aot` runs it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from gam_fast.kernels import formulas, moves, sums, updates
from gam_fast.kernels.table import BLOCK_OF_TOTALS, DTYPES, FORMULAS, HEADER, SUMS, THREADS_OF_TOTALS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gam_fast.backends.launches import OF_SUMS, OF_UPDATES, Shape

from .sass import LOADS, SPILLS, instructions_of, loops

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")},
}

ALONG = {"PROJECT": True, "CLIP": True, "ROWS": 16}


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants, and the numbers of arrays that a block reads and writes."""

    kernel: Any
    constants: dict[str, Any]
    lists: int = 0
    reads: int = 0
    writes: int = 0

    @property
    def name(self) -> str:
        """The kernel's name with the constants that distinguish it."""
        hidden = ("ROWS", "FORMULA", "OF_GROUP", "OF_LEAF")
        chosen = [f"{k.lower()}={int(v)}" for k, v in self.constants.items() if k not in hidden]
        return f"{self.constants.get('FORMULA', self.kernel).__name__} {' '.join(chosen)}"


def update(formula: str, terms: int, partly: int, states: int, lacked: int) -> Variant:
    """Return the kernel of a base optimizer's step with ``states`` lists of state."""
    of_group, of_leaf, _ = FORMULAS[formula]
    chosen = {"FORMULA": getattr(formulas, formula), "OF_GROUP": of_group, "OF_LEAF": of_leaf, "STATES": states}
    constants = {**chosen, "LACKED": lacked, "TERMS": terms, "PARTLY": partly, **ALONG}
    reads = terms + states + (formula != "assign")  # θ
    return Variant(updates.update, constants, 2 + terms + states, reads, 1 + states)


VARIANTS = [
    *(
        Variant(
            sums.sums,
            {"TERMS": terms, "PARTLY": partly, "WEIGHTED": weighted, "WITH_M": with_m, "SUMS": count},
            1 + terms,
            terms + weighted,
        )
        for terms, partly, weighted, with_m, count in (
            (1, 0, False, False, 1),
            (2, 0, True, False, 1),
            (1, 0, False, False, 3),
            (3, 0, False, True, 3),
            (3, 7, False, True, 3),
        )
    ),
    *(
        Variant(
            moves.perturb,
            {"DIFFERENCE": diff, "WEIGHTED": weighted, "SAVE": save, "FROM_START": far, "FOLDED": folded},
            4 + 2 * folded,
            2 + diff + 2 * folded + (weighted and not save and not far),
            1 + save + folded,
        )
        for diff, weighted, save, far, folded in (
            (False, False, True, False, False),
            (False, True, True, False, False),
            (True, False, False, True, False),
            (False, False, False, False, True),
            (True, True, False, False, True),
        )
    ),
    *(
        update(*row)
        for row in (
            ("sgd", 1, 0, 0, 0),
            ("sgd", 3, 0, 1, 0),
            ("sgd", 3, 7, 1, 1),
            ("adam", 1, 0, 2, 0),
            ("adam", 3, 0, 2, 0),
            ("adam", 3, 7, 3, 4),
            ("lion", 3, 0, 1, 0),
            ("assign", 3, 0, 0, 0),
            ("assign", 2, 3, 0, 0),
        )
    ),
]


@dataclass(frozen=True)
class Compiled:
    """The compiler's report.

    ``local`` counts accesses to local memory: on NVIDIA in the loops over whole blocks, on AMD its bytes anywhere.
    ``loads`` and ``stores`` count accesses of 16 bytes in the text of the program.
    """

    registers: int
    local: int
    loads: int
    stores: int


def compile_for(kernel: Any, constants: dict[str, Any], threads: int, target: GPUTarget) -> Compiled:
    """Compile a kernel whose pointers are aligned to 16 bytes, as in a launch."""
    integers = ("pieces", "table", "starts", "mark")
    scalars = {"rows": "i32", "stride": "i32", "ticket": "i64"}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in scalars:
            signature[name] = scalars[name]
        else:
            signature[name] = "*i64" if name in integers else "*fp64"
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=target, options=options)
    return _cuda(compiled) if target.backend == "cuda" else _hip(compiled)


def _cuda(compiled: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(dump), "-res-usage", "-sass", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", report)
    assert registers, report
    hot = [loop for loop in loops(instructions_of(report)) if any(LOADS.search(line) for line in loop)]
    text = compiled.asm["ptx"]
    local = sum(bool(SPILLS.search(line)) for loop in hot for line in loop) + text.count(".local")
    loads, stores = (
        len(re.findall(rf"\b{access}\.global\S*\.v(?:4\.[bfus]32|2\.[bfus]64)", text)) for access in ("ld", "st")
    )
    return Compiled(int(registers[1]), local, loads, stores)


def _hip(compiled: Any) -> Compiled:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    loads, stores = (len(re.findall(rf"\b(?:global|buffer)_{a}_dwordx4", text)) for a in ("load", "store"))
    local = number("private_segment_fixed_size") + number("vgpr_spill_count")  # scalars spill to vector lanes
    return Compiled(number("vgpr_count"), local, loads, stores)


def vectors(variant: Variant, dtype: str, shape: Shape) -> tuple[int, int]:
    """Return the reads and writes of 16 bytes that a thread needs for its share of a block."""
    vectors_of_one = shape.block // shape.threads * getattr(torch, dtype).itemsize // 16
    return variant.reads * vectors_of_one, variant.writes * vectors_of_one


def check(name: str, *, quick: bool = False, of_updates: Shape = OF_UPDATES) -> list[tuple[str, Compiled, str]]:
    """Compile every kernel for one target. Return its name, its report, and the errors found."""
    target, place = TARGETS[name], list(TARGETS).index(name)
    result = []
    for i, variant in enumerate(VARIANTS):
        dtypes = (DTYPES[(place + i) % len(DTYPES)],) if quick else DTYPES
        shape = OF_SUMS if variant.kernel.__module__ == sums.__name__ else of_updates
        constants = {**variant.constants, "WIDTH": HEADER + variant.lists, "BLOCK": shape.block}
        for dtype in dtypes:
            found = compile_for(variant.kernel, {**constants, "TYPE": getattr(tl, dtype)}, shape.threads, target)
            loads, stores = vectors(variant, dtype, shape)
            wrong = "uses local memory" if found.local else ""
            if found.loads < loads or found.stores < stores:
                wrong += f" has {found.loads} loads and {found.stores} stores of 16 bytes, not {loads} and {stores}"
            result.append((f"{variant.name}, {dtype}, {shape.block}/{shape.threads}", found, wrong))
    for count in (1, SUMS):
        constants = {"SUMS": count, "BLOCK": BLOCK_OF_TOTALS}
        found = compile_for(sums.totals, constants, THREADS_OF_TOTALS, target)
        result.append((f"totals of {count}", found, "uses local memory" if found.local else ""))
    return result


def main(argv: list[str] | None = None) -> int:
    """Run the checks from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: all)")
    parser.add_argument("--all", action="store_true", help="show every kernel, not only a summary")
    parser.add_argument("--quick", action="store_true", help="one dtype for each kernel and target, in turn")
    options = parser.parse_args(argv)
    names = options.targets.split(",")
    if not set(names) <= set(TARGETS):
        parser.error(f"--targets must be of {', '.join(TARGETS)}, got {options.targets}")
    print(f"Triton {triton.__version__}")
    failed = 0
    with ProcessPoolExecutor(min(len(names), os.cpu_count() or 1), get_context("spawn")) as pool:
        for name, rows in zip(names, pool.map(partial(check, quick=options.quick), names), strict=True):
            for what, found, wrong in rows:
                if options.all or wrong:
                    print(f"  {name}: {what}: {found.registers} registers {wrong}")
            wrongs = sum(bool(wrong) for _, _, wrong in rows)
            failed += wrongs
            registers = [found.registers for _, found, _ in rows]
            print(f"{name}: {len(rows)} kernels, {min(registers)} to {max(registers)} registers, {wrongs} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
