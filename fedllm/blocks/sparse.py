"""Sparse entries - a few entries of each weight, drawn once and alike everywhere from a seed.

A seed travels in place of the places: both sides draw them. The values are one vector per layer, in ascending order of
the places. Names: LAYER.sparse holds values, LAYER.sparse_at flat places in the [out, in] matrix of that layer.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from fedllm.blocks.lora import A, B, LoraPair, Split, digest, energy
from fedllm.core.errors import ConfigError
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

    Drawn without replacement by NumPy, whose streams may differ between versions: compare a digest of it.
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


def agreed(layers: dict[str, tuple[int, int]], seed: int, density: float, theirs: str, client: str) -> Tensors:
    """The places; raises :class:`ConfigError` where they are not those of the digest `theirs`."""
    found = places(layers, seed, density)
    if digest(found) != theirs:
        raise ConfigError(
            f"Client '{client}' drew other entries than the server.",
            "Both need the same model, adapter, density and version of NumPy.",
        )
    return found


def dense(values: torch.Tensor, index: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The matrix [out, in] that holds `values` at `index` and zeros elsewhere."""
    return values.new_zeros(shape[0] * shape[1]).index_copy(0, index, values).view(shape)


def bridge(params: Tensors, values: Tensors, index: Tensors, split: Split) -> tuple[Tensors, float]:
    """LoRA whose products are the sparse changes, cut to its rank by SVD.

    Args:
        params: LoRA's first values (and a head, which stays); their A takes over where a change has no direction left.
        values: LAYER.sparse of every layer.
        index: LAYER.sparse_at of every layer.
        split: where singular values go.

    Returns:
        The tensors, and the share of the squared norm of all changes that the cut keeps (1 where they are 0).
    """
    found, kept, whole = dict(params), 0.0, 0.0
    for name, shape in shapes(params).items():
        first = params[name + A]
        parts = torch.linalg.svd(dense(values[name + VALUES], index[name + PLACES], shape), full_matrices=False)
        pair = LoraPair.from_svd(parts, first.shape[0], split, first)
        found[name + A], found[name + B] = pair.a, pair.b
        part, total = energy(parts[1], pair.rank)
        kept, whole = kept + part, whole + total
    return found, kept / whole if whole else 1.0
