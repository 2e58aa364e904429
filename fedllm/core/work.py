"""Work - what a client's coroutine may ask of the model; the only places where the model runs.

A method's client half is plain imperative code: `report = await client.fit(...)`. Awaiting hands one of the
requests below to the driver, which runs the requests of many clients as one pass where they are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy
import torch

from fedllm.core.message import Json, Received, Upload
from fedllm.core.roster import Group
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train

if TYPE_CHECKING:
    from fedllm.core.split import Ends

Row = Mapping[str, Any]
Terms = Sequence[tuple[float, Tensors]]
"""(weight, tensors that stand in for those of the same name): the loss is the weighted sum over the terms."""
Penalty = Callable[..., torch.Tensor]
"""penalty(params, start=..., **given) -> scalar: added to one client's loss. Written for one client."""
Correction = Callable[..., Tensors]
"""correction(grads, params=..., start=..., **given) -> grads: applied to one client's gradient before clipping."""


@dataclass(frozen=True)
class Fit:
    """Train from `start`."""

    start: Tensors
    train: Train
    penalty: Penalty | None = None
    correction: Correction | None = None
    given: dict[str, Tensors] = field(default_factory=dict)
    """Further trees handed to penalty and correction by name."""
    split: str = "train"
    fixed: Tensors | None = None
    """Tensors the model runs with that do not move."""
    terms: Terms | None = None
    """None: the loss of the model as it is."""
    rows: Sequence[Row] | None = None
    """Rows to train on in place of a split."""
    targets: Sequence[torch.Tensor] | None = None
    """One tensor of logits per row, for a loss that is not the task's."""
    loss: Literal["task", "mae", "mse", "kl"] = "task"
    """The task's loss on labels, or mean absolute error, mean squared error, KL divergence to `targets`."""
    moments: Tensors | None = None
    """The optimiser's memory to go on from ({}: begin one and report it); None begins afresh and forgets."""
    begun: int | None = None
    """Steps already taken of one endless stream of batches; None draws a fresh order every round."""


@dataclass(frozen=True)
class Gradient:
    """The gradient of the mean loss over all of the client's examples, at `params`."""

    params: Tensors
    split: str = "train"
    fixed: Tensors | None = None
    rows: Sequence[Row] | None = None


@dataclass(frozen=True)
class Score:
    """Measure `params` (None: the base model) on a split of the client's data."""

    params: Tensors | None
    split: str = "eval"
    fixed: Tensors | None = None
    rows: Sequence[Row] | None = None


@dataclass(frozen=True)
class Outputs:
    """The logits of some rows, in their order: [C] for classes, [labels, V] for language models."""

    params: Tensors | None
    rows: Sequence[Row]
    fixed: Tensors | None = None


@dataclass(frozen=True)
class Hidden:
    """The hidden states of some rows as one batch: one tensor [rows, T, H] per layer, embeddings first."""

    params: Tensors | None
    rows: Sequence[Row]
    fixed: Tensors | None = None


@dataclass(frozen=True)
class Expose:
    """How much each input of the last layer depends on some rows; see :class:`Exposing`."""

    params: Tensors
    rows: Sequence[Row]
    fixed: Tensors | None = None


@dataclass(frozen=True)
class Generate:
    """Continue prompts with `params` (None: the base model); greedy where temperature is 0."""

    params: Tensors | None
    prompts: tuple[str, ...]
    max_tokens: int = 64
    temperature: float = 0.0


@dataclass(frozen=True)
class Embed:
    """One vector per text: the mean of the last hidden states over the real tokens."""

    params: Tensors | None
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Directions:
    """scale * sum_j values_j z(seeds_j), added to tensors; see :mod:`fedllm.blocks.zeroth`."""

    seeds: Sequence[int]
    values: torch.Tensor
    """[len(seeds)]"""
    scale: float = 1.0


@dataclass(frozen=True)
class Probe:
    """Losses at theta + eps z and theta - eps z on the same batch, seed after seed: forward passes without dropout.

    With `lr` the probe walks: theta <- theta - lr (g z + decay theta) after each seed, where g is the slope
    (loss+ - loss-) / (2 eps), and every seed has the next batch. Without it all seeds share the round's first batch.
    A seed whose losses are not finite, or further apart than `limit`, moves nothing and has the slope NaN.
    """

    start: Tensors | None
    """None: the model's own first values. A model that lends its weights (:class:`Lending`) walks in place."""
    seeds: Sequence[int]
    train: Train
    """Batch size and accumulation; everything else of it is the caller's to use."""
    eps: float
    lr: float | None = None
    decay: float = 0.0
    """Decoupled weight decay of tensors with two or more dimensions."""
    replay: Directions | None = None
    """Added to the start before the first seed."""
    limit: float | None = None
    split: str = "train"
    fixed: Tensors | None = None
    measure: bool = False
    """Score `split` at the start (with `replay`), in place of probing."""
    first: Callable[[], Tensors] | None = None
    """Makes the start where none is given and the model does not lend its weights."""


Request = Fit | Gradient | Score | Outputs | Hidden | Expose | Generate | Embed | Probe


@dataclass(frozen=True)
class Exchange:
    """Give `upload` to the server and wait for what it sends in this session; see `Client.exchange`."""

    upload: Upload


@dataclass(frozen=True)
class FitReport:
    """What local training did.

    Attributes:
        params: the trained tensors.
        delta: params - start.
        steps: optimiser steps really taken.
        rate_sum: the sum of the learning rates of those steps.
        loss: name -> (sum, n) form of the mean training loss: (sum over labelled tokens or examples, their number).
        examples: examples seen, repetitions counted.
        tokens: tokens seen, padding not counted.
        moments: the optimiser's memory, where the request gave one: `KEY.NAME` tensors and the scalar `step`.
    """

    params: Tensors
    delta: Tensors
    steps: int
    rate_sum: float
    loss: tuple[float, float]
    examples: int
    tokens: int
    moments: Tensors | None = None

    @property
    def metrics(self) -> dict[str, tuple[float, float]]:
        """For :class:`~fedllm.core.message.Upload`: the training loss as (sum, n)."""
        return {"loss": self.loss}


@dataclass(frozen=True)
class ScoreReport:
    """Additive counts of a split: "loss" over "tokens", "exact" over "examples", ... and their values."""

    counts: dict[str, float]
    values: dict[str, float | None]

    @property
    def metrics(self) -> dict[str, tuple[float, float]]:
        """Every count as (count, 1), so that summed metrics are summed counts."""
        return {name: (value, 1.0) for name, value in self.counts.items()}


@dataclass(frozen=True)
class ProbeReport(FitReport):
    """What a :class:`Probe` found; `params` and `delta` are empty where the model's own weights were used.

    Attributes:
        slopes: g by seed, float32 [seeds]; NaN where a seed was skipped.
        score: the measurement, where that was asked for.
    """

    slopes: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    score: ScoreReport | None = None

    @property
    def kept(self) -> list[int]:
        """The places of the seeds that were not skipped."""
        return torch.nonzero(torch.isfinite(self.slopes)).flatten().tolist()


class Asked:
    """An awaitable that hands `request` to the driver and resolves to its result."""

    def __init__(self, request: Request | Exchange) -> None:
        self.request = request

    def __await__(self) -> Generator[Request | Exchange, Any, Any]:
        return (yield self.request)


class Client(Protocol):
    """What a method's client half may use. Everything here belongs to one client and nobody else.

    Attributes:
        id: the client's id.
        size: its number of training examples.
        round: the current round, from 1.
        rounds: the number of rounds of the run.
        population: how many clients are registered.
        private: its private store, kept between rounds and never sent; only the names declared in `Method.private`.
        group: its group: model, rank, device class.
        turn: how often it was asked before in this round (see :class:`~fedllm.core.state.CollectMore`).
    """

    id: str
    size: int
    round: int
    rounds: int
    population: int
    private: MutableMapping[str, Tensors | Json]
    group: Group
    turn: int

    def initial(self) -> Tensors:
        """First values of the trainable tensors of this client's own model; new tensors."""
        ...

    def rng(self, purpose: str) -> numpy.random.Generator:
        """A random stream of this client, this round and `purpose`."""
        ...

    def rows(self, split: str = "train") -> Sequence[Mapping[str, Any]]:
        """The client's rows, as loaded."""
        ...

    def examples(self, split: str = "train") -> Sequence[Example]:
        """The client's rows as the task prepared them, for a protocol that works on batches itself."""
        ...

    def ends(self, first: int, last: int | None) -> Ends:
        """This client's part of a model whose layers first..last-1 are the server's; see :mod:`fedllm.core.split`."""
        ...

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
        """Train from `start`; see :class:`Fit`."""
        ...

    async def gradient(
        self,
        params: Tensors,
        *,
        split: str = "train",
        fixed: Tensors | None = None,
        rows: Sequence[Row] | None = None,
    ) -> tuple[Tensors, tuple[float, float]]:
        """The gradient of the mean loss over a split (or `rows`) at `params`, and the loss as (sum, n)."""
        ...

    async def score(
        self,
        params: Tensors | None,
        split: str = "eval",
        *,
        fixed: Tensors | None = None,
        rows: Sequence[Row] | None = None,
    ) -> ScoreReport:
        """Measure; see :class:`Score`."""
        ...

    async def outputs(
        self, params: Tensors | None, rows: Sequence[Row], *, fixed: Tensors | None = None
    ) -> list[torch.Tensor]:
        """Logits per row; see :class:`Outputs`."""
        ...

    async def hidden(
        self, params: Tensors | None, rows: Sequence[Row], *, fixed: Tensors | None = None
    ) -> list[torch.Tensor]:
        """Hidden states per layer; see :class:`Hidden`."""
        ...

    async def expose(self, params: Tensors, rows: Sequence[Row], *, fixed: Tensors | None = None) -> Exposure:
        """How much each input of the last layer depends on rows; see :class:`Expose`."""
        ...

    async def exchange(self, upload: Upload) -> Received:
        """Give `upload` to the server and wait for its answer; what this coroutine holds stays alive meanwhile.

        The server sees an answer with a session and goes on with :meth:`fedllm.core.server.Server.reply`. Raises
        GeneratorExit inside the coroutine where the server closes the session or does not answer in time.
        """
        ...

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
        """Slopes along seeded directions, from forward passes alone; see :class:`Probe`."""
        ...

    async def generate(
        self, params: Tensors | None, prompts: Sequence[str], max_tokens: int = 64, temperature: float = 0.0
    ) -> list[str]:
        """Continue prompts; see :class:`Generate`."""
        ...

    async def embed(self, params: Tensors | None, texts: Sequence[str]) -> torch.Tensor:
        """Shape [len(texts), hidden size]; see :class:`Embed`."""
        ...


@dataclass(frozen=True)
class Example:
    """One prepared (tokenised) example.

    Attributes:
        inputs: the model's inputs for this example: name -> 1-d integer tensor, or any tensor for images.
        labels: what is to be predicted: token ids with -100 where nothing is, a class number, tag numbers.
        tokens: real input tokens.
        targets: how many labels count (the n of its loss).
        soft: logits to learn from in place of the labels, where a request gave some.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    tokens: int
    targets: int
    soft: torch.Tensor | None = None


Groups = Sequence[Sequence[Example]]
"""Examples by client, in the order of the stacked parameters."""
Places = Sequence[Sequence[int]] | None
"""By client the place of each row in the client's own batch; None: 0, 1, 2, ..."""


class Learner(Protocol):
    """What can be trained, measured and asked: a base model with its trainable tensors and its task.

    The engine knows a model only through this. `params` are stacked: a leading client axis of size K = len(groups).

    Attributes:
        device: where parameters live while they are used.
        width_limit: the most clients one pass can hold (None: any number).
        score_names: metric names of :meth:`values`, the first is the headline metric.
        higher_is_better: whether a higher headline metric is better.
    """

    device: torch.device
    width_limit: int | None
    score_names: tuple[str, ...]
    higher_is_better: bool

    def initial(self) -> Tensors:
        """The first values of all trainable tensors (no client axis); the same on every machine."""
        ...

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Tokenise rows; a row without a usable label is left out (and counted by the learner's notes)."""
        ...

    def using(self, params: Tensors | None, seeds: Sequence[int] | None = None, places: Places = None) -> Any:
        """A context in which the model runs with `params`; `seeds` (one per client) switch dropout on.

        What dropout leaves out is a function of the seed and the place of a row in its client's batch.
        """
        ...

    def losses(self, groups: Groups) -> torch.Tensor:
        """Inside :meth:`using`: the SUM of the losses of each client's examples, shape [K], differentiable."""
        ...

    def counts_by_row(self, groups: Groups) -> list[dict[str, float]]:
        """Inside :meth:`using`: additive counts of every example, client after client."""
        ...

    def outputs(self, groups: Groups) -> list[torch.Tensor]:
        """Inside :meth:`using`: differentiable logits of every example, client after client."""
        ...

    def hidden(self, groups: Groups) -> list[torch.Tensor]:
        """Inside :meth:`using`: per layer the hidden states of all examples, [rows, T, H], 0 at padding."""
        ...

    def values(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """Metric values of (summed) counts; None where there is nothing to measure."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[str]], max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[list[str]]:
        """Inside :meth:`using`: continuations per client."""
        ...

    def embed(self, texts: Sequence[Sequence[str]]) -> list[torch.Tensor]:
        """Inside :meth:`using`: one matrix per client."""
        ...


class Exposure(NamedTuple):
    """What the last layer is given, and how much that depends on the texts.

    Attributes:
        layer: the name of the layer's weight [C, F].
        inputs: r, [rows, F].
        slopes: ||dr/dx||, the norm of each input's gradient in the embedded text, [rows, F].
    """

    layer: str
    inputs: torch.Tensor
    slopes: torch.Tensor


@runtime_checkable
class Exposing(Protocol):
    """A learner whose logits come out of a linear layer, and that can tell how its inputs depend on the texts."""

    def exposure(self, groups: Groups) -> Exposure:
        """Inside :meth:`Learner.using`, of one client."""
        ...


@runtime_checkable
class Lending(Protocol):
    """A learner whose own weights can be changed in place for a while, where a second copy would not fit."""

    def weights(self) -> Tensors | None:
        """The trainable tensors inside the model, by the names of `initial`; None where they are not its weights."""
        ...


class Rows(Protocol):
    """Where clients' data comes from: read on demand, nothing kept for clients that are not asked."""

    client_ids: list[str]

    def size(self, client_id: str, split: str = "train") -> int:
        """Rows of a split."""
        ...

    def rows(self, client_id: str, split: str = "train") -> Sequence[Mapping[str, Any]]:
        """The rows of a split."""
        ...
