"""Across - what the benchmarks of runs across sites share: a network of real processes, and what runs inside them."""
