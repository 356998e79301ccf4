"""Tools for development: calls per step, GPU checks, and inspection of compiled kernels."""
