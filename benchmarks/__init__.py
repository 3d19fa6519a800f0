"""Measurements of lrpfast beside its peers. `python -m benchmarks.engine` prints the table of the README."""
