"""Methods of data sets, benchmarks and convergence (survey 2.5)."""
