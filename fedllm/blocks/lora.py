"""LoRA pairs - the algebra of low-rank factors: product, truncation, padding, SVD to a rank, norm.

The scale is always folded in: `LoraPair.of` multiplies A and B by its square root, so that two pairs of different
ranks mean the same thing entry by entry (alpha / rank would not; Bai et al., 2402.11505; Cho et al., 2401.06432).
Shapes: A [r, d_in], B [d_out, r]; the weight change is B @ A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from fedllm.core.errors import ConfigError, UploadRejected
from fedllm.core.tensors import Tensors
from fedllm.core.view import View

A, B = ".lora_A", ".lora_B"
"""Endings of the names of the two factors."""
Split = Literal["both", "out"]
"""Where the singular values of a product go: their roots into A and B, or all into B."""
Svd = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""(U, S, V^T)."""


@dataclass(frozen=True)
class LoraPair:
    """One pair of factors with scale 1."""

    a: torch.Tensor
    b: torch.Tensor

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise UploadRejected(
                f"LoRA factors of shapes {tuple(self.a.shape)} and {tuple(self.b.shape)} do not match.",
                "A is [rank, in] and B is [out, rank].",
            )

    @classmethod
    def of(cls, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0) -> LoraPair:
        """A pair whose product is scale * B A."""
        root = scale**0.5
        return cls(a * root, b * root)

    def factors(self, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) for a layer that multiplies by `scale`: the inverse of :meth:`of`."""
        root = scale**-0.5
        return self.a * root, self.b * root

    @property
    def rank(self) -> int:
        """The number of rows of A."""
        return self.a.shape[0]

    def product(self) -> torch.Tensor:
        """B A, shape [out, in]."""
        return self.b @ self.a

    def truncate(self, rank: int) -> LoraPair:
        """The first `rank` rows of A and columns of B."""
        return LoraPair(self.a[:rank].clone(), self.b[:, :rank].clone())

    def pad(self, rank: int) -> LoraPair:
        """Zero rows and columns up to `rank`; the product does not change."""
        if rank < self.rank:
            raise ConfigError(f"A pair of rank {self.rank} cannot be padded to {rank}.", "Use truncate or to_rank.")
        a, b = self.a.new_zeros(rank, self.a.shape[1]), self.b.new_zeros(self.b.shape[0], rank)
        a[: self.rank], b[:, : self.rank] = self.a, self.b
        return LoraPair(a, b)

    def norm(self) -> torch.Tensor:
        """||B A|| (Frobenius) without forming the product: sqrt(sum((B^T B) * (A A^T)))."""
        return ((self.b.T @ self.b) * (self.a @ self.a.T)).sum().clamp(min=0).sqrt()

    @classmethod
    def from_product(
        cls, product: torch.Tensor, rank: int, split: Split = "both", fresh: torch.Tensor | None = None
    ) -> LoraPair:
        """The best pair of `rank` for a weight change, by SVD in float32; see :meth:`from_svd`."""
        return cls.from_svd(torch.linalg.svd(product.float(), full_matrices=False), rank, split, fresh)

    @classmethod
    def from_svd(cls, parts: Svd, rank: int, split: Split = "both", fresh: torch.Tensor | None = None) -> LoraPair:
        """The best pair of `rank` for U S V^T. Pairs of smaller ranks are its first rows and columns.

        Signs are fixed (the largest entry of each left vector is positive), so that every machine gives the same pair.

        Args:
            parts: (U, S, V^T), singular values descending.
            rank: rank of the result.
            split: `both` - the roots of the singular values go into A and B; `out` - all of them into B.
            fresh: A of at least `rank` rows: where nothing is left of the product, its row takes the place in A beside
                a column of B that is 0, so that the direction can still be learnt; None puts zeros in both, which
                no gradient moves.
        """
        u, s, v = parts
        least = float(s[0]) * max(u.shape[0], v.shape[1]) * torch.finfo(torch.float32).eps if s.numel() else 0.0
        kept = min(rank, int((s > least).sum()))
        u, s, v = u[:, :kept], s[:kept], v[:kept]
        sign = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True))).squeeze(0)
        inside, outside = (sign * s.sqrt(), sign * s.sqrt()) if split == "both" else (sign, sign * s)
        pair = cls(v * inside.unsqueeze(1), u * outside).pad(rank)
        if fresh is not None:
            pair.a[kept:] = fresh[kept:rank]
        return pair

    def to_rank(self, rank: int, split: Split = "both", fresh: torch.Tensor | None = None) -> LoraPair:
        """The best pair of `rank` for this product; see :meth:`from_svd`."""
        return LoraPair.from_svd(self.svd(), rank, split, fresh)

    def svd(self) -> Svd:
        """(U, S, V^T) of the product, at most min(in, out) singular values.

        With fewer rows than that the product is never formed: QR of both factors, then the SVD of a small core
        (Golub and Van Loan, Matrix Computations, 5.2).
        """
        if self.rank >= min(self.a.shape[1], self.b.shape[0]):
            return torch.linalg.svd((self.b.float() @ self.a.float()), full_matrices=False)
        left, upper = torch.linalg.qr(self.b.double())
        right, other = torch.linalg.qr(self.a.double().T)
        u, s, v = torch.linalg.svd(upper @ other.T, full_matrices=False)
        return (left @ u).float(), s.float(), (v @ right.T).float()


def energy(singular: torch.Tensor, rank: int) -> tuple[float, float]:
    """The sum of squares of the first `rank` singular values, and that of all: what a cut keeps of ||D||^2."""
    squares = singular.double().square()
    return float(squares[:rank].sum()), float(squares.sum())


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A short fingerprint of names, shapes and bits, by which two sides compare what they hold."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def pairs(tensors: Mapping[str, torch.Tensor], scale: float = 1.0) -> dict[str, LoraPair]:
    """Layer name -> pair, of an adapter's tensors."""
    names = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    return {name: LoraPair.of(tensors[name + A], tensors[name + B], scale) for name in names}


def unpaired(found: Mapping[str, LoraPair], scale: float = 1.0) -> Tensors:
    """The tensors of an adapter: the inverse of :func:`pairs`."""
    result: Tensors = {}
    for name, pair in found.items():
        result[name + A], result[name + B] = pair.factors(scale)
    return result


def rank_view(tensors: Mapping[str, torch.Tensor], rank: int) -> View:
    """The view of the first `rank` rows of every A and columns of every B; other tensors whole."""
    regions: dict[str, tuple[slice | torch.Tensor, ...]] = {}
    for name, tensor in tensors.items():
        if name.endswith(A):
            regions[name] = (slice(0, min(rank, tensor.shape[0])),)
        elif name.endswith(B):
            regions[name] = (slice(0, tensor.shape[0]), slice(0, min(rank, tensor.shape[1])))
        else:
            regions[name] = ()
    return View(regions)
