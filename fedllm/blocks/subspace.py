"""Subspace - a soft prompt as a point of a low-dimensional space, and texts scrambled to see whether they matter.

Black-box tuning (Sun et al., ICML 2022, arXiv 2201.03514): P(z) = A z + p0 with a fixed random A, the same at every
client as it is drawn from a seed. Scrambled inputs are FedBPT's (arXiv 2310.01467, section 3.3): a prompt that only
learns how often labels occur lowers the loss on them as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy
import torch
from pydantic import BaseModel, ConfigDict, Field

from fedllm.core.errors import ConfigError, DataError
from fedllm.core.seeds import torch_stream

TEXTS = ("instruction", "input", "text", "tokens")
ANSWERS = ("response", "label", "tags")


@lru_cache(maxsize=2)
def projection(seed: int, numbers: int, size: int) -> torch.Tensor:
    """Standard normal numbers [numbers, size], float32, the same on every machine; not to be written to."""
    return torch.randn(numbers, size, generator=torch_stream(seed, "projection"))


class Subspace(BaseModel):
    """Where a prompt is searched: scale A z / sqrt(size) + first, with the scale at which z = 1 is a likely prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    size: int = Field(500, ge=2)
    """Dimensions d of the search."""
    sigma: float = Field(1.0, gt=0)
    """The first step size."""
    alpha: float = Field(1.0, gt=0)
    """Scale of the projection."""
    spread: float | None = Field(None, gt=0)
    """Deviation that the scale is taken from; that of the first prompt's own numbers where null."""
    seed: int = 0
    """The projection is drawn from it; it must be the same at every client."""

    def scale(self, first: torch.Tensor) -> float:
        """By how much a prompt's numbers deviate from `first` where z has deviation 1.

        Args:
            first: the first prompt; its own deviation stands for that of the embeddings it was drawn from.

        Raises:
            ConfigError: `first` is the same number everywhere.
        """
        found = float(first.double().std()) if self.spread is None else self.spread
        if not found > 0:
            raise ConfigError(
                "The first prompt has the same number everywhere, so there is no scale to search at.",
                "The scale is the deviation of its numbers.",
                action="Set method.subspace.spread, or adapter.init=vocabulary.",
            )
        return self.alpha * found / self.sigma

    def prompt(self, z: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The prompt at `z` [size], in the shape of `first`; see :meth:`scale`."""
        with torch.no_grad():
            moved = projection(self.seed, first.numel(), self.size) @ z.to(torch.float32)
            return first + (self.scale(first) / self.size**0.5) * moved.view(first.shape)


def ratio(loss: float | None, other: float | None, floor: float) -> float:
    """The loss over the loss on scrambled inputs (`floor` at least); not a number where one of them is missing."""
    if loss is None or other is None or math.isnan(other):
        return math.nan
    return loss / max(other, floor)


def scrambled(rows: Sequence[Mapping[str, Any]], rate: float, rng: numpy.random.Generator) -> list[dict[str, Any]]:
    """Rows whose input words are each replaced, with probability `rate`, by a word of another place; labels stay.

    Raises:
        DataError: rows without an input apart from what is to be predicted.
    """
    named = [[name for name in TEXTS if name in row] for row in rows]
    if not all(names and any(answer in row for answer in ANSWERS) for names, row in zip(named, rows, strict=True)):
        raise DataError(
            "The rows have no input beside what is to be predicted, so it cannot be scrambled.",
            f"Inputs: {', '.join(TEXTS)}; predicted: {', '.join(ANSWERS)}.",
            action="Set method.fitness=loss.",
        )
    pool = [word for row, names in zip(rows, named, strict=True) for name in names for word in _words(row[name])]

    def changed(value: Any) -> Any:
        words = _words(value)
        hit, other = rng.random(len(words)) < rate, rng.integers(0, max(1, len(pool)), len(words))
        mixed = [pool[j] if h else word for word, h, j in zip(words, hit, other, strict=True)]
        return mixed if isinstance(value, list) else " ".join(mixed)

    return [
        {name: changed(value) if name in names else value for name, value in row.items()}
        for row, names in zip(rows, named, strict=True)
    ]


def _words(value: Any) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else str(value).split()
