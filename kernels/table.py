"""Layout of the launch metadata, for the host, which builds the tables, and for the kernels.

A launch has one program per piece. A piece is ``CHUNK`` elements of one leaf, or its remainder. All tensors of a launch
have one dtype, and all tensors of a leaf are dense with the same memory order, so kernels see flattened arrays. All
metadata are int64 tensors in device memory:

- ``pieces``: for each program, the leaf, the first element and the number of elements, ordered by group;
- ``table``: one row per leaf, of ``HEADER`` words and one address per list (0 if the leaf is not in the list).

The header words of a row are the index of its group, the index of its options in an update, and whether it is packed.
A leaf whose arrays are all aligned to 16 bytes is *packed*: its whole blocks are read and written without masks, 16
bytes at once. Its remainder, and all other leaves, use a mask. The order of additions does not depend on this.

Numbers are float64 tensors, ordered by group.
"""

from __future__ import annotations

CHUNK = 8192
"""Elements per piece, as in ``csrc/cuda/table.h``. It is large enough that a program's first reads are a small part of
its work, and small enough that the 25.6 M elements of a ResNet-50 give a large GPU several rounds of programs."""

BLOCK_OF_SUMS = 1024
"""Elements that a program adds up at once. Each has an accumulator in the working precision, which gets ``CHUNK /
BLOCK_OF_SUMS`` = 8 products; everything else is added in fp64. This is not tuned: the order of a sum depends on it."""

THREADS_OF_SUMS = 128
"""Threads per program of sums: each loads 16 bytes of a 16-bit block at once, 32 of fp32. Not tuned either."""

BLOCK_OF_TOTALS = 4096
"""Pieces whose sums a group's program adds up at once. 10⁹ elements have 122,000 pieces."""

THREADS_OF_TOTALS = 1024
"""Threads of that program. With 128 threads and 1024 pieces at once, sums on an H200 took some 1.7 µs longer than
native ones for each 1024 pieces."""

GROUP, OPTION, PACKED, HEADER = range(4)

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Names of the dtypes in torch and Triton."""

SUMS = 3
"""Number of products per piece: ‖u‖², ⟨m,u⟩, ‖m‖²."""

PERTURB = ("radius", "eta", "k", "l", "multiple")
TERM = ("p", "q", "used")
"""Names, in order, of a group's numbers for perturb, and of the numbers per term that follow a kernel's."""

FORMULAS = {"sgd": (6, 1, 1), "adam": (6, 2, 3), "lion": (6, 0, 1), "assign": (0, 0, 0)}
"""For each step in ``formulas.py``: its counts of numbers per group, numbers per leaf, and state lists."""
