"""Client - what a method's client half sees: its own data, its private store, and the model behind `await`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch

from fedllm.core.message import Received, Upload
from fedllm.core.roster import ALL, Group
from fedllm.core.seeds import numpy_stream
from fedllm.core.split import Ends, Halves
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import (
    Asked,
    Correction,
    Directions,
    Embed,
    Example,
    Exchange,
    Expose,
    Exposure,
    Fit,
    FitReport,
    Generate,
    Gradient,
    Hidden,
    Outputs,
    Penalty,
    Probe,
    ProbeReport,
    Row,
    Score,
    ScoreReport,
    Terms,
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
    first: Callable[[], Tensors]
    held: Callable[[str], Sequence[Example]]
    cut: Callable[[int, int | None], Halves]
    group: Group = ALL
    turn: int = 0

    def initial(self) -> Tensors:
        """First values of the trainable tensors of this client's own model."""
        return self.first()

    def rng(self, purpose: str) -> numpy.random.Generator:
        """A random stream of this client, this round (and turn) and `purpose`."""
        return numpy_stream(self.seed, "client", self.id, self.round, purpose, *([self.turn] if self.turn else []))

    def rows(self, split: str = "train") -> Sequence[Mapping[str, Any]]:
        """The client's rows, as loaded."""
        return self.read(split)

    def examples(self, split: str = "train") -> Sequence[Example]:
        """The client's rows as the task prepared them."""
        return self.held(split)

    def ends(self, first: int, last: int | None) -> Ends:
        """This client's part of a split model."""
        return self.cut(first, last).ends

    async def fit(
        self,
        start: Tensors,
        train: Train,
        penalty: Penalty | None = None,
        correction: Correction | None = None,
        *,
        split: str = "train",
        fixed: Tensors | None = None,
        terms: Terms | None = None,
        rows: Sequence[Row] | None = None,
        targets: Sequence[torch.Tensor] | None = None,
        loss: Literal["task", "mae", "mse", "kl"] = "task",
        moments: Tensors | None = None,
        begun: int | None = None,
        **given: Tensors,
    ) -> FitReport:
        """Train from `start`; see :class:`fedllm.core.work.Fit`."""
        where = split, fixed, terms, rows, targets, loss, moments, begun
        return await Asked(Fit(start, train, penalty, correction, given, *where))

    async def gradient(
        self,
        params: Tensors,
        *,
        split: str = "train",
        fixed: Tensors | None = None,
        rows: Sequence[Row] | None = None,
    ) -> tuple[Tensors, tuple[float, float]]:
        """The gradient of the mean loss over a split (or `rows`) at `params`, and the loss as (sum, n)."""
        return await Asked(Gradient(params, split, fixed, rows))

    async def score(
        self,
        params: Tensors | None,
        split: str = "eval",
        *,
        fixed: Tensors | None = None,
        rows: Sequence[Row] | None = None,
    ) -> ScoreReport:
        """Measure `params` on a split (or `rows`)."""
        return await Asked(Score(params, split, fixed, rows))

    async def outputs(
        self, params: Tensors | None, rows: Sequence[Row], *, fixed: Tensors | None = None
    ) -> list[torch.Tensor]:
        """Logits per row."""
        return await Asked(Outputs(params, rows, fixed))

    async def hidden(
        self, params: Tensors | None, rows: Sequence[Row], *, fixed: Tensors | None = None
    ) -> list[torch.Tensor]:
        """Hidden states per layer."""
        return await Asked(Hidden(params, rows, fixed))

    async def expose(self, params: Tensors, rows: Sequence[Row], *, fixed: Tensors | None = None) -> Exposure:
        """How much each input of the last layer depends on rows."""
        return await Asked(Expose(params, rows, fixed))

    async def probe(
        self,
        start: Tensors | None,
        seeds: Sequence[int],
        train: Train,
        eps: float,
        *,
        lr: float | None = None,
        decay: float = 0.0,
        replay: Directions | None = None,
        limit: float | None = None,
        split: str = "train",
        fixed: Tensors | None = None,
        measure: bool = False,
    ) -> ProbeReport:
        """Slopes along seeded directions; see :class:`fedllm.core.work.Probe`."""
        how = lr, decay, replay, limit, split, fixed, measure, self.first
        return await Asked(Probe(start, seeds, train, eps, *how))

    async def exchange(self, upload: Upload) -> Received:
        """Give `upload` to the server and wait for its answer in this session."""
        return await Asked(Exchange(upload))

    async def generate(
        self, params: Tensors | None, prompts: Sequence[str], max_tokens: int = 64, temperature: float = 0.0
    ) -> list[str]:
        """Continue prompts."""
        return await Asked(Generate(params, tuple(prompts), max_tokens, temperature))

    async def embed(self, params: Tensors | None, texts: Sequence[str]) -> torch.Tensor:
        """One vector per text."""
        return await Asked(Embed(params, tuple(texts)))
