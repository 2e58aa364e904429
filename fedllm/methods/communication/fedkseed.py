"""FedKSeed - every weight of the model is tuned, and a round trip is under 18 kilobytes whatever the model's size.

A zeroth-order step moves along a direction that a seed regenerates, by a slope that is one number. With a finite pool
of K seeds a whole run is K numbers: weight = first value - lr * sum_j A_j z(s_j). The server sends one master seed and
A; a client rebuilds its weights, walks tau steps and sends (index, slope) pairs. FedKSeed-Pro draws seeds by how large
their slopes were. The weights themselves never travel and lie nowhere but in the model.

Deviations: slopes are rounded to float32 before a client steps, so that what is replayed is what was walked. z is
N(0, 1) by table (see blocks/zeroth.py). The server holds A in float64 and sends it as float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator

from fedllm.blocks.zeroth import SEED_LIMIT, Kept, pairs, pool, shares
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
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

CLIP = 1000.0
"""Slopes are clipped to this before they are averaged into scores."""


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

    train: Train = Train(steps=200, batch_size=1, lr=3e-7, optimizer="sgd", clip_norm=None)
    """Local training: `steps` is tau. The rate is that of a language model with 10^9 weights; small ones need more."""
    pool_size: int = Field(4096, ge=1)
    """K, the number of candidate seeds; the paper takes 1024 for Pro."""
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
        train = self.train
        given = {
            "train.optimizer": (train.optimizer, "sgd"),
            "train.momentum": (train.momentum, 0.0),
            "train.weight_decay": (train.weight_decay, 0.0),
            "train.clip_norm": (train.clip_norm, None),
            "train.schedule.kind": (train.schedule.kind, "constant"),
            "train.schedule.warmup": (train.schedule.warmup, 0.0),
            "train.epochs": (train.epochs, None),
        }
        for name, (value, needed) in given.items():
            if value != needed:
                text = "null" if needed is None else needed
                raise ConfigError(
                    f"{name}={value} and FedKSeed do not go together: K sums tell the weights only if every step was "
                    "plain and of the same rate.",
                    action=f"Set {name}={text}.",
                )
        return self

    def init(self, start: Tensors) -> State:
        """A = 0; the first weights are at every client already."""
        zero = torch.zeros(self.pool_size, dtype=torch.float64)
        seen = {"magnitude": zero.clone(), "count": zero.clone()} if self.pro else {}
        return State({}, {"pool": {"sums": zero, **seen}}, {"master": 0})

    async def prepare(self, server: Server, state: State) -> State:
        """Draw the master seed."""
        return replace(state, numbers={**state.numbers, "master": derive(server.seed, "pool") % SEED_LIMIT})

    def distribute(self, state: State, client: Member) -> Received:
        """The master seed and A; in Pro the probabilities as well."""
        sent = {"master": torch.tensor(state.numbers["master"], dtype=torch.int32)}
        sent["sums"] = state.memory["pool"]["sums"].float()
        if self.pro:
            sent["chances"] = _chances(state.memory["pool"]).float()
        return Received(None, pool=sent)

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Rebuild the weights, walk tau steps, give back the slopes."""
        given, steps = received["pool"], self.train.step_count(client.size)
        chances = given["chances"].double().numpy() if self.pro else None
        drawn = client.rng("seeds").choice(
            self.pool_size, size=steps, p=None if chances is None else chances / chances.sum()
        )
        seeds = pool(int(given["master"]), self.pool_size)
        report = await client.probe(
            None, [seeds[j] for j in drawn], self.train, self.eps, lr=self.train.lr, replay=self._replay(given),
            limit=self.limit,
        )  # fmt: skip
        sent = pairs(drawn[report.kept].tolist(), report.slopes[report.kept])
        if self.upload == "pairs":
            return Upload(sent, client.size, report.metrics)
        sums = _spread(sent, self.pool_size, self.pro)
        return Upload({n: t.float() for n, t in sums.items()}, client.size, report.metrics)

    @property
    def reducer(self) -> Reducers:
        """Pairs with their weights, or the mean of the sums."""
        most = self.train.steps or 10
        return Kept(most, self.pool_size) if self.upload == "pairs" else Mean(self.weighting)
