"""Prompt learning (3.1-3.7)."""
