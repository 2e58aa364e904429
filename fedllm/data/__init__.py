"""Data - whose rows a run uses: files and hub data sets, the split into clients, groups on disk, statistics."""
