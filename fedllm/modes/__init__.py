"""Modes - wrappers around the uploads of any method."""
