"""Client - what a method's client half sees: its own data, its private store, and the model behind `await`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from fedllm.core.seeds import numpy_stream
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import (
    Asked,
    Correction,
    Embed,
    Fit,
    FitReport,
    Generate,
    Gradient,
    Penalty,
    Score,
    ScoreReport,
)
from fedllm.engine.private import PrivateView


@dataclass
class TurnClient:
    """One client during one turn; implements :class:`fedllm.core.work.Client`."""

    id: str
    size: int
    round: int
    rounds: int
    population: int
    private: PrivateView
    seed: int
    read: Callable[[str], Sequence[Mapping[str, Any]]]

    def rng(self, purpose: str) -> numpy.random.Generator:
        """A random stream of this client, this round and `purpose`."""
        return numpy_stream(self.seed, "client", self.id, self.round, purpose)

    def rows(self, split: str = "train") -> Sequence[Mapping[str, Any]]:
        """The client's rows, as loaded."""
        return self.read(split)

    async def fit(
        self,
        start: Tensors,
        train: Train,
        penalty: Penalty | None = None,
        correction: Correction | None = None,
        **given: Tensors,
    ) -> FitReport:
        """Train from `start`; see :class:`fedllm.core.work.Fit`."""
        return await Asked(Fit(start, train, penalty, correction, given))

    async def gradient(self, params: Tensors) -> tuple[Tensors, tuple[float, float]]:
        """The full-data gradient at `params` and the loss as (sum, n)."""
        return await Asked(Gradient(params))

    async def score(self, params: Tensors | None, split: str = "eval") -> ScoreReport:
        """Measure `params` on a split."""
        return await Asked(Score(params, split))

    async def generate(
        self, params: Tensors | None, prompts: Sequence[str], max_tokens: int = 64, temperature: float = 0.0
    ) -> list[str]:
        """Continue prompts."""
        return await Asked(Generate(params, tuple(prompts), max_tokens, temperature))

    async def embed(self, params: Tensors | None, texts: Sequence[str]) -> torch.Tensor:
        """One vector per text."""
        return await Asked(Embed(params, tuple(texts)))
