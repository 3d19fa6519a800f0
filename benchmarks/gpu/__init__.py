"""Measurements of the GPU kernels, and what can be known of them without a GPU; see `python -m benchmarks.gpu --help`."""
