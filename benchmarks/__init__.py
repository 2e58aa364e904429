"""Benchmarks - one file per question; `python -m benchmarks` answers them and writes the tables into the docs."""
