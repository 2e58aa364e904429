"""Dash - a small web page over the files of a run: how it goes, what left a site, and which rule allowed it."""
