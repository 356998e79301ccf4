"""What a launch gets of the lists of tensors: plain numbers, for the host, which makes the tables, and for the kernels.

A launch has one program a piece, that is ``CHUNK`` elements of one leaf, or what is left of it. All tensors of a launch
are of one dtype, and each of a leaf lies densely in the same order of memory: kernels see flat arrays. Everything that
they must know of the lists lies in tensors of int64 in the memory of the device:

- ``pieces``: for each program the leaf, the first element and the number of elements, pieces of a group together;
- ``table``: a row a leaf, of ``HEADER`` words and one address a list (0 where the leaf has none in it).

The words of a row are the number of its group, its place among the options of an update, and whether it is packed.
Block whose arrays are all aligned to 16 bytes are *packed*: their whole blocks are read and written without masks, 16
bytes at once; what is left of them, and all of the others, under a mask. Which elements are added up together does not
depend on that.

Numbers are in tensors of float64, those of one group after those of another.
"""

from __future__ import annotations

CHUNK = 8192
"""Elements of a piece, as in ``csrc/cuda/table.h``: many enough that what its program reads first is a small part of
it, few enough that the 25.6 M elements of a ResNet-50 keep all multiprocessors of a large GPU busy for some rounds."""

BLOCK_OF_SUMS = 1024
"""Elements that a program adds up at once. Each has an accumulator in the working precision, which gets ``CHUNK /
BLOCK_OF_SUMS`` = 8 products; all else is added in fp64. Not tuned: the order of a sum depends on it."""

THREADS_OF_SUMS = 128
"""Each has 16 bytes of a block of a 16-bit type at once, 32 of fp32. Not tuned either."""

BLOCK_OF_TOTALS = 1024
"""Pieces whose sums are added up at once by the one program of a group: 10⁹ elements have 122,000 of them."""

GROUP, OPTION, PACKED, HEADER = range(4)

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Names in torch and Triton."""

SUMS = 3
"""Numbers of a piece's products: ‖u‖², ⟨m,u⟩, ‖m‖²."""

PERTURB = ("radius", "eta", "k", "l", "multiple")
TERM = ("p", "q", "used")
"""Names of the numbers of a group, in their order: of perturb, and of each term that follows those of a kernel."""

FORMULAS = {"sgd": (6, 1, 1), "adam": (6, 2, 3), "lion": (6, 0, 1), "assign": (0, 0, 0)}
"""By the name of a step in ``formulas.py``: how many numbers of a group and of a leaf it has, and lists of state."""
