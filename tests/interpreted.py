"""Triton's interpreter, mended: imported by a test process that has ``TRITON_INTERPRET=1``, before a kernel runs.

It computes with NumPy, and differs from a GPU in three ways that would hide what the tests look for:

- fp32 is truncated to bf16, not rounded to nearest even;
- ``fma`` rounds the product; here it is rounded once, so that kernels give the bits of the compiled core;
- NumPy warns of what a GPU does silently: infinities, NaN.

Besides, Triton 3.6 and older read the bounds of a loop in a way that NumPy 2.4 refuses; and every call of a function in
a kernel replaces the whole of ``triton.language`` again, which takes more than half of the time.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from gam_fast import sums

_convert_float = interpreter._convert_float
_patch_lang_tensor = interpreter._patch_lang_tensor
_patch_lang = interpreter._patch_lang


def round_to_bfloat16(x):
    """The 16 bits of each fp32 number, to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FFF), rounded).astype(np.uint16)


def two_sum(x, y):
    """The rounded sum, and what it is off by."""
    total = x + y
    of_y = total - x
    return total, (x - (total - of_y)) + (y - of_y)


def sum_to_odd(x, y):
    """``x + y`` rounded to odd: where it is not exact and its last bit is 0, one unit towards the exact value."""
    total, error = two_sum(x, y)
    even = (np.ascontiguousarray(total).view(np.int64) & 1) == 0
    inexact = np.isfinite(error) & (error != 0)
    return np.where(inexact & even, np.nextafter(total, np.copysign(np.inf, error)), total)


def two_product(x, y):
    """The rounded product, and what it is off by, of numbers below 1e300."""

    def split(value):
        high = value * 134217729.0
        high = high - (high - value)
        return high, value - high

    product = x * y
    (a, b), (c, d) = split(x), split(y)
    return product, ((a * c - product) + a * d + b * c) + b * d


def multiply_add(x, y, z):
    """``x y + z``, rounded once (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).

    In fp64 the product of two fp32 numbers is exact, and a sum rounded to odd there has more than twice their bits, so
    that rounding it to fp32 gives what rounding the exact value does.
    """
    if x.dtype == np.float32:
        return sum_to_odd(x.astype(np.float64) * y, z.astype(np.float64)).astype(np.float32)
    product, error = two_product(x, y)
    first, of_first = two_sum(z, error)
    second, of_second = two_sum(product, first)
    exact = second + sum_to_odd(of_first, of_second)
    return np.where(np.isfinite(exact), exact, x * y + z)


def convert_float(x, source, target, mode):
    if source == tl.float32 and target == tl.bfloat16:
        return round_to_bfloat16(x)
    return _convert_float(x, source, target, mode)


def create_fma(self, x, y, z):
    return interpreter.TensorHandle(multiply_add(x.data, y.data, z.data), z.dtype.scalar)


def patch_lang_tensor(tensor, scope):
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))


patched = set()
"""The modules, by their names, whose ``triton.language`` is replaced for the present launch."""


class PatchScope(interpreter._LangPatchScope):
    def restore(self):
        super().restore()
        patched.clear()


def patch_lang(fn):
    module = fn.__globals__["__name__"]
    if module in patched:
        return None  # a function that a kernel calls: the launch restores
    patched.add(module)
    return _patch_lang(fn)


interpreter._LangPatchScope = PatchScope
interpreter._patch_lang = patch_lang
interpreter._convert_float = convert_float
interpreter._patch_lang_tensor = patch_lang_tensor
interpreter.InterpreterBuilder.create_fma = create_fma
np.seterr(all="ignore")


def use(monkeypatch):
    """Treats the CPU as a device that must not be waited for, as the kernels' own is."""
    monkeypatch.setattr(sums, "reads_are_free", lambda device: False)
