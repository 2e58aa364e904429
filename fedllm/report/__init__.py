"""Report - what a run found, for people: a page, tables for the terminal, and numbers for trackers."""
