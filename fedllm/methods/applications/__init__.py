"""Applications (survey 3.9)."""
