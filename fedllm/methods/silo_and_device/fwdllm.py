"""FwdLLM - many devices each probe a little; the server adds their forward gradients and moves once they agree.

A device perturbs the trainable tensors along z, and slope * z is an unbiased estimate of the gradient. The server pools
estimates until two halves of the pool differ little (variance-controlled pacing), asking the same devices for more on
the same data; so an update costs more probes as gradients shrink. Devices may look at many candidate directions and
keep those closest to the last pooled gradient (discriminative sampling), in every second update, as published.

Deviations: variance and cosine are over all trainable tensors; `relative` divides the variance by the mean square of
the pooled gradient. Filtering inflates the step along the old gradient: lower the rate. A pool of one waits for more.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from pydantic import Field, model_validator

from fedllm.blocks.zeroth import SEED_LIMIT, Kept, Weighed, cosines, disagreement, pairs, plain_steps, replay
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.state import CollectMore, State
from fedllm.core.tensors import Tensors, add, count, finite, zeros
from fedllm.core.train import Schedule, Train
from fedllm.core.work import Client

if TYPE_CHECKING:
    from fedllm.core.server import Server

PLAIN = Train(batch_size=8, lr=0.01, optimizer="sgd", clip_norm=None, schedule=Schedule(kind="linear"))  # pyright: ignore


TURN = re.compile(r"@([1-7])$")
"""How the pool names what a client gave when it was asked again."""


class FwdLLM(Method):
    """Federated gradient descent on forward gradients."""

    card = Card(
        title="FwdLLM - backprop-free tuning by perturbed inferences of many devices",
        paper="Xu et al., USENIX ATC 2024, arXiv:2308.13894",
        cells=("2.4 Cross-Device",),
        travels="down: trainable tensors, when filtering the last gradient; up: an estimate of theirs, or 8 B a probe",
        claim="Pacing by variance and filtered directions reach more with the same number of perturbed inferences.",
        status="runs",
    )
    only_fits = feeds = False

    train: Train = PLAIN
    """Batch size of a probe, and the server's learning rate with its schedule over the rounds."""
    weighting: Literal["uniform"] = "uniform"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Every probe counts alike."""
    eps: float = Field(0.01, gt=0)
    """How far a probe goes along z to either side."""
    perturbations: int = Field(1, ge=1)
    """Probes of a client in a collection, all on one batch."""
    candidates: int = Field(1, ge=1)
    """Directions looked at for each that is probed, in every second update: the paper takes 10; 1 filters nothing."""
    threshold: float = Field(0.1, gt=0)
    """The server moves where the mean variance of the two half-means is at most this."""
    relative: bool = False
    """Take the variance as a share of the pooled gradient's mean square: a threshold for any model."""
    most: int = Field(4, ge=1, le=8)
    """Collections after which the server moves in any case."""
    upload: Literal["estimate", "pairs"] = "estimate"
    """What comes up: the sum of slope * z, or (seed, slope) pairs."""

    @model_validator(mode="after")
    def _plain(self) -> FwdLLM:
        plain_steps(self.train.model_copy(update={"schedule": Schedule()}), "the server makes plain gradient steps")  # pyright: ignore
        return self

    def init(self, start: Tensors) -> State:
        """No gradient is known yet."""
        if not count(start):
            raise ConfigError("FwdLLM has nothing to train.", "At least one trainable tensor is needed.")
        return State(start)

    async def prepare(self, server: Server, state: State) -> State:
        """Remember how many rounds there are, for the schedule."""
        return replace(state, numbers={**state.numbers, "rounds": server.rounds})

    def distribute(self, state: State, client: Member) -> Received:
        """theta, and the last gradient where this update filters."""
        known = state.memory.get("gradient", {})
        return Received(state.params, gradient=known) if known else Received(state.params)

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Choose directions, probe them, give back the estimates."""
        known = received["gradient"] if "gradient" in received.parts else {}
        draws = self.perturbations * (self.candidates if known else 1)
        seeds = client.rng("seeds").integers(SEED_LIMIT, size=draws).tolist()
        if known and self.candidates > 1 and finite(known) is None:
            likeness = cosines(known, seeds)
            seeds = [seeds[i] for i in torch.topk(likeness, self.perturbations).indices.tolist()]
        report = await client.probe(received.params, seeds, self.train, self.eps)
        chosen, slopes = [seeds[i] for i in report.kept], report.slopes[report.kept]
        if self.upload == "pairs":
            return Upload(pairs(chosen, slopes), len(chosen), report.metrics)
        return Upload(replay(zeros(received.params), chosen, slopes), len(chosen), report.metrics)

    @property
    def reducer(self) -> Reducers:
        """The pool: single contributions, of which two halves are compared."""
        return Kept(self.perturbations if self.upload == "pairs" else None)

    def expected(self, state: State) -> dict[str, Tensors]:
        """An estimate has the shapes of theta."""
        return {"update": state.params} if self.upload == "estimate" else {}

    def finalize(self, state: State, update: Update) -> State | CollectMore:
        """Move against the pooled gradient where its halves agree; else collect more from the same clients."""
        kept = cast("dict[str, Weighed]", update.collected["update"])
        halves = [self._half(state, list(kept.values())[start::2]) for start in (0, 1)]
        turns = 1 + max(int(found[1]) if (found := TURN.search(name)) else 0 for name in kept)
        variance, square = disagreement(*halves)
        if turns < self.most and not variance <= self.threshold * (square if self.relative else 1.0):
            return CollectMore(again=True)
        total = sum(n for _, n in halves)
        gradient = {n: ((halves[0][0][n] + halves[1][0][n]) / max(total, 1)).float() for n in state.params}
        rate = self.train.lr * self.train.schedule.factor(state.round, state.numbers["rounds"])
        remembered = {} if self.candidates == 1 or state.memory.get("gradient") else gradient
        return state.with_(add(state.params, gradient, -rate), gradient=remembered)

    def _half(self, state: State, parts: list[Weighed]) -> tuple[Tensors, float]:
        """The sum of a half's estimates, float64, and of how many probes it is."""
        none = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in state.params.items()}
        if self.upload == "pairs":
            seeds = [int(seed) for part in parts for seed in part.tensors["seed"]]
            return replay(none, seeds, torch.cat([torch.zeros(0), *(p.tensors["value"] for p in parts)])), len(seeds)
        counted = sum(min(part.weight, float(self.perturbations)) for part in parts)
        return {n: sum((p.tensors[n].double() for p in parts), t) for n, t in none.items()}, counted
