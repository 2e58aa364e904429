"""Low rank - a matrix as the product of two thin ones.

A thin random matrix, multiplied by M a few times and orthonormalised, comes to span the directions in which M is
largest; M is then sent as its projection onto them.

Source: Vogels et al., PowerSGD, NeurIPS 2019, algorithm 1. Deviations: the paper keeps the right factor of the step
before, averaged over all workers, as a warm start; here every upload begins afresh and does more iterations instead, so
that nothing has to be shared between clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

from fedllm.modes.coded import Section


@dataclass(frozen=True)
class LowRank:
    """M [m, n] as P [m, r] and Q [n, r], decoded as P Q^T; exact where M has rank r or less.

    Dimensions after the first are taken together.

    Args:
        rank: r.
        iterations: how often M is applied to the random start; at least 1.
    """

    rank: int
    iterations: int = 2

    def pays(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether the factors are smaller than a tensor of this shape and type."""
        m, n = _sides(shape)
        return self.rank < min(m, n) and 4 * self.rank * (m + n) < m * n * dtype.itemsize

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> list[Section]:
        """See :class:`~fedllm.modes.coded.Coder`: P and Q in float32."""
        return [(torch.float32, side * self.rank) for side in _sides(shape)]

    def encode(self, values: torch.Tensor, dtype: torch.dtype, rng: numpy.random.Generator) -> list[torch.Tensor]:
        """See :class:`~fedllm.modes.coded.Coder`."""
        matrix = values.reshape(_sides(values.shape)).float()
        unit = matrix.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)  # products of tiny or huge numbers
        matrix = matrix / unit
        right = torch.from_numpy(rng.standard_normal((matrix.shape[1], self.rank), dtype=numpy.float32))
        left = torch.linalg.qr(matrix @ right).Q
        for _ in range(self.iterations - 1):
            left = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ left).Q).Q
        return [left.reshape(-1), (matrix.T @ left * unit).reshape(-1)]

    def decode(self, sections: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
        """See :class:`~fedllm.modes.coded.Coder`."""
        left, right = (section.view(-1, self.rank) for section in sections)
        return (left @ right.T).reshape(list(shape))


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns; (0, 0) where it is no matrix."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
