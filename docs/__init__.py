"""Docs - what builds the pages that are made from the code, and what captures real output for them."""
