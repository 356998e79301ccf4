"""Benchmarks, each with `--help`: `python -m bench.throughput`, `python -m bench.overhead`, `python -m bench.kernels`."""
