"""Flat - the tensors of all parts of an upload as one vector, in the order of parts and names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fedllm.core.errors import UploadRejected
from fedllm.core.message import Dense, Message
from fedllm.core.tensors import Tensors


class Flat:
    """What an upload looks like, and how it becomes a vector.

    Args:
        expected: part -> tensors of the names and shapes an upload has; their values are where a round begins.
        parts: the parts that count.
    """

    def __init__(self, expected: Mapping[str, Tensors], parts: Iterable[str]) -> None:
        self.like = {(part, name): t for part in sorted(parts) for name, t in sorted(expected[part].items())}

    @property
    def size(self) -> int:
        """D, the length of the vector."""
        return sum(tensor.numel() for tensor in self.like.values())

    def row(self, upload: Message) -> torch.Tensor:
        """[D], float32; raises :class:`UploadRejected` for a part that is not dense."""
        for name, part in upload.parts.items():
            if not isinstance(part, Dense):
                raise UploadRejected(f"The part '{name}' is {part.kind}.", "Dense parts are vectors.")
        return joined(upload[part][name] for part, name in self.like)

    @property
    def model(self) -> torch.Tensor:
        """[D]: the values that `expected` has."""
        return joined(self.like.values())

    def parts(self, row: torch.Tensor) -> dict[str, Dense]:
        """A vector as parts again."""
        pieces = row.split([t.numel() for t in self.like.values()])
        found: dict[str, Tensors] = {}
        for ((part, name), like), piece in zip(self.like.items(), pieces, strict=True):
            found.setdefault(part, {})[name] = piece.reshape(like.shape).to(like.dtype)
        return {part: Dense(tensors) for part, tensors in found.items()}


def joined(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """One vector, float32, on the CPU."""
    return torch.cat([t.detach().cpu().float().reshape(-1) for t in tensors])
