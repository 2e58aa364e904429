"""Sparse entries - a few entries of each weight, drawn once and alike everywhere from a seed.

A seed travels in place of the places: both sides draw them. The values are one vector per layer, in ascending order of
the places. Names: LAYER.sparse holds values, LAYER.sparse_at flat places in the [out, in] matrix of that layer.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from fedllm.blocks.lora import A, B
from fedllm.core.seeds import numpy_stream
from fedllm.core.tensors import Tensors

VALUES, PLACES = ".sparse", ".sparse_at"
"""Endings of the names of a layer's values and of their places."""


def sparse_count(shape: tuple[int, int], density: float) -> int:
    """How many entries of a matrix are drawn: at least one."""
    return max(1, round(density * shape[0] * shape[1]))


@lru_cache(maxsize=1024)
def sparse_index(seed: int, name: str, shape: tuple[int, int], density: float) -> torch.Tensor:
    """The flat places of a layer's entries, ascending, int64, shape [nnz]; do not change it, it is shared.

    Drawn without replacement by NumPy, whose streams may differ between versions: compare a :func:`fedllm.blocks.lora.digest`.
    """
    size = shape[0] * shape[1]
    drawn = numpy_stream(seed, "sparse", name).choice(size, sparse_count(shape, density), replace=False, shuffle=False)
    return torch.from_numpy(drawn).sort().values


def shapes(tensors: Tensors) -> dict[str, tuple[int, int]]:
    """Layer name -> (out, in), of an adapter's LoRA factors."""
    names = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    return {name: (tensors[name + B].shape[0], tensors[name + A].shape[1]) for name in names}


def places(layers: dict[str, tuple[int, int]], seed: int, density: float) -> Tensors:
    """LAYER.sparse_at of every layer."""
    return {name + PLACES: sparse_index(seed, name, shape, density) for name, shape in layers.items()}


def dense(values: torch.Tensor, index: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The matrix [out, in] that holds `values` at `index` and zeros elsewhere."""
    return values.new_zeros(shape[0] * shape[1]).index_copy(0, index, values).view(shape)
