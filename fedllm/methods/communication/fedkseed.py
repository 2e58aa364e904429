"""FedKSeed - every weight of the model is tuned, and a round trip is under 18 kilobytes whatever the model's size.

A zeroth-order step moves along a direction that a seed regenerates, by a slope that is one number. With a pool of K
seeds a run is K numbers: weight = first value - lr * sum_j A_j z(s_j). The server sends a master seed and A; a client
rebuilds its weights, walks tau steps and sends (index, slope) pairs. FedKSeed-Pro draws seeds by their slopes' size.

Deviations: slopes are rounded to float32 before a client steps, so that what is replayed is what was walked. z comes
from a table (blocks/zeroth.py). The server holds A in float64 and sends it as float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator

from fedllm.blocks import zeroth
from fedllm.core.card import Card
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Mean, Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.seeds import derive
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Client, Directions

if TYPE_CHECKING:
    from fedllm.core.server import Server


class FedKSeed(Method):
    """Full-parameter tuning by K seeds and their sums of slopes."""

    card = Card(
        title="FedKSeed - full-parameter tuning that exchanges the scalars of K seeds",
        paper="Qin et al., ICML 2024, arXiv:2312.06353",
        cells=("2.3 Communication Efficiency",),
        travels="down: a master seed (4 B) and K sums (4K B), for Pro K probabilities; up: 8 B per local step",
        claim="Full-parameter tuning with under 18 kB per client and round; accuracy rises with K and then saturates.",
        status="verified",
    )
    only_fits = feeds = False

    train: Train = Train(steps=200, batch_size=1, lr=3e-7, optimizer="sgd", clip_norm=None)  # pyright: ignore
    """Local training: `steps` is tau. The rate is that of a language model with 10^9 weights; small ones need more."""
    pool_size: int | None = Field(None, ge=1)
    """K, the number of candidate seeds; null is 4096, and 1024 for Pro."""
    eps: float = Field(5e-4, gt=0)
    """How far a probe goes along z to either side."""
    limit: float | None = Field(None, gt=0)
    """A step whose two losses are further apart than this is skipped."""
    pro: bool = False
    """Draw seeds by the size of their slopes so far (FedKSeed-Pro) in place of uniformly."""
    upload: Literal["pairs", "sums"] = "pairs"
    """What comes up: a pair per step, or K sums per client, which may be added up in secret."""

    @model_validator(mode="after")
    def _constant(self) -> FedKSeed:
        zeroth.plain_steps(self.train, "K sums tell the weights only if every step was plain and of the same rate")
        return self

    @property
    def size(self) -> int:
        """K."""
        return self.pool_size or (1024 if self.pro else 4096)

    def init(self, start: Tensors) -> State:
        """A = 0; the first weights are at every client already."""
        zero = torch.zeros(self.size, dtype=torch.float64)
        seen = {name: zero.clone() for name in zeroth.SCORES} if self.pro else {}
        return State({}, {"pool": {"sums": zero, **seen}}, {"master": 0})

    async def prepare(self, server: Server, state: State) -> State:
        """Draw the master seed."""
        return replace(state, numbers={**state.numbers, "master": derive(server.seed, "pool") % zeroth.SEED_LIMIT})

    def distribute(self, state: State, client: Member) -> Received:
        """The master seed and A; in Pro the probabilities as well."""
        sent = {"master": torch.tensor(state.numbers["master"], dtype=torch.int32)}
        sent["sums"] = state.memory["pool"]["sums"].float()
        if self.pro:
            sent["chances"] = zeroth.chances(state.memory["pool"]).float()
        return Received(None, pool=sent)

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Rebuild the weights, walk tau steps, give back the slopes; the walked weights are discarded."""
        given, replay, lr = received["pool"], self._replay(received), self.train.lr
        places = zeroth.drawn(client.rng("seeds"), self.size, self.train.steps or 10, given.get("chances"))
        chosen = [replay.seeds[j] for j in places]
        report = await client.probe(None, chosen, self.train, self.eps, lr=lr, replay=replay, limit=self.limit)
        sent = zeroth.pairs(places[report.kept].tolist(), report.slopes[report.kept])
        if self.upload == "pairs":
            return Upload(sent, client.size, report.metrics)
        found = {n: t.float() for n, t in zeroth.by_seed(sent, self.size).items()}
        scores = {"scores": {n: found[n] for n in zeroth.SCORES}} if self.pro else {}
        return Upload({"sums": found["sums"]}, client.size, report.metrics, **scores)

    @property
    def reducer(self) -> Reducers:
        """Pairs with their weights; or the mean of the sums, and the scores added up."""
        if self.upload == "pairs":
            return zeroth.Kept(self.train.steps or 10, self.size)
        return {"update": Mean(self.weighting), **({"scores": Mean("uniform")} if self.pro else {})}

    def expected(self, state: State) -> dict[str, Tensors]:
        """Sums have K entries; pairs are checked by their reducer: a seed outside the pool refuses the upload."""
        if self.upload == "pairs":
            return {}
        zero = torch.zeros(self.size)
        return {"update": {"sums": zero}, **({"scores": dict.fromkeys(zeroth.SCORES, zero)} if self.pro else {})}

    def finalize(self, state: State, update: Update) -> State:
        """A <- A + sum_i omega_i a_i; in Pro |g| and counts by seed are added up."""
        if self.upload == "pairs":
            change = zeroth.pooled(update.collected["update"], self.size, self.weighting)
        else:
            scores = update["scores"] if self.pro else {}
            change = {"sums": update["update"]["sums"], **{n: t * update.clients for n, t in scores.items()}}
        return state.with_(pool={n: t + change[n] for n, t in state.memory["pool"].items()})

    def weights(self, state: State, start: Tensors) -> Tensors:
        """w0 moved along all directions by A: what (w0, A) stand for, as every client rebuilds it."""
        seeds = zeroth.pool(state.numbers["master"], self.size)
        return zeroth.rebuilt(start, seeds, state.memory["pool"]["sums"].float(), -self.train.lr)

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """Measure the weights that (w0, A) stand for."""
        replay = self._replay(received)
        report = await client.probe(None, (), self.train, self.eps, replay=replay, split="eval", measure=True)
        return Upload(None, client.size, report.score.metrics if report.score else {})

    def _replay(self, received: Received) -> Directions:
        seeds = zeroth.pool(int(received["pool"]["master"]), self.size)
        return Directions(seeds, received["pool"]["sums"], -self.train.lr)
