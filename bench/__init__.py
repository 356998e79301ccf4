"""Benchmarks; `python -m bench.overhead --help`, `python -m bench.kernels --help`."""
