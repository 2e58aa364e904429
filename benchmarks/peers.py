"""Peers - fedllm, OpenFedLLM, Flower and pfl do the same work beside a plain loop: what does each cost?

    OMP_NUM_THREADS=1 python -m benchmarks.peers [--quick]

Every engine plays in a process of its own, where a plain PyTorch loop does the same optimiser steps right after each
round, so that a ratio compares seconds of one process at one time. CPU seconds are those of the engine's whole process
tree. Before anything is told, the adapters that the engines end with are compared: the same steps on the same batches
give the same adapter. The loops are in :mod:`benchmarks.peer_loops`.
"""

from __future__ import annotations
