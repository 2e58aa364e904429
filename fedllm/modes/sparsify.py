"""Sparsify - only the entries of largest magnitude travel, with their places.

Sources: Stich et al., Sparsified SGD with Memory, NeurIPS 2018, section 2; Lin et al., Deep Gradient Compression, ICLR
2018, section 3. Ours: places travel as a bit per entry where that is shorter than a number per kept entry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

from fedllm.modes.coded import Section, narrowed
from fedllm.modes.quantise import bits_of, truths


@dataclass(frozen=True)
class TopK:
    """The k largest magnitudes of n, k = max(1, round(density n)); of equal ones those that come first.

    Args:
        density: the share that is kept, above 0 and at most 1.
    """

    density: float

    def kept(self, n: int) -> int:
        """How many of n entries are kept."""
        return min(n, max(1, round(self.density * n)))

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> list[Section]:
        """See :class:`~fedllm.modes.coded.Coder`: the places (a bit each, or gaps between them), then the values."""
        n = math.prod(shape)
        k, wide = self.kept(n), torch.int32 if n < 2**31 else torch.int64
        bits, gaps = (torch.uint8, (n + 7) // 8), (wide, k)
        return [min(bits, gaps, key=lambda section: section[0].itemsize * section[1]), (dtype, k)]

    def encode(self, values: torch.Tensor, dtype: torch.dtype, rng: numpy.random.Generator) -> list[torch.Tensor]:
        """See :class:`~fedllm.modes.coded.Coder`."""
        flat = values.reshape(-1)
        mask = largest(flat.abs(), self.kept(flat.numel()))
        (places, _), *_ = self.layout(values.shape, dtype)
        if places is torch.uint8:
            return [bits_of(mask), narrowed(flat[mask], dtype)]
        found = mask.nonzero().reshape(-1)
        return [found.diff(prepend=found.new_zeros(1)).to(places), narrowed(flat[found], dtype)]

    def decode(self, sections: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """See :class:`~fedllm.modes.coded.Coder`."""
        places, kept = sections
        n = math.prod(shape)
        if places.dtype == torch.uint8:
            found = truths(places, n).nonzero().reshape(-1)
        else:
            found = places.cumsum(0, dtype=torch.int64)
        rising = found.numel() < 2 or int(found.diff().amin()) > 0
        if (
            found.numel() != kept.numel()
            or not rising
            or (kept.numel() and not 0 <= int(found[0]) <= int(found[-1]) < n)
        ):
            raise ValueError(f"places that are not {kept.numel()} of {n}")
        result = kept.new_zeros(n)
        result[found] = kept
        return result.reshape(list(shape))


def largest(magnitudes: torch.Tensor, k: int) -> torch.Tensor:
    """A mask [n] of the k largest of `magnitudes` [n]; among equals the first are taken."""
    n = magnitudes.numel()
    if k == n:
        return torch.ones(n, dtype=torch.bool)
    bar = magnitudes.topk(k, sorted=False).values.amin()
    mask = magnitudes > bar
    ties = (magnitudes == bar).nonzero().reshape(-1)
    mask[ties[: k - int(mask.sum())]] = True
    return mask
