"""Blocks - the mechanisms that methods share."""
