"""Deploy - a network of a server, its coordinators and its sites: files, kits, units, what is looked at before a start.

It stands between the command line and :mod:`fedllm.engine.nvflare`, which alone knows FLARE.
"""
