"""Benchmarks; each has `--help`, as `python -m bench.throughput --help`."""
