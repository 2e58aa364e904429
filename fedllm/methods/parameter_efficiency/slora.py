"""SLoRA - a few rounds of sparse weight training give LoRA a start that the data chose.

LoRA from B = 0 lags behind full fine-tuning where clients differ. In stage 1 a few entries of each adapted weight are
trained, drawn once for all clients from a seed, and averaged. Then the bridge: what they changed, D, is cut by SVD to
the rank of LoRA and the base is as it was. Stage 2 is federated LoRA from there.

Deviations: entries are kept in units of LoRA's scale s, so that the bridge is B A = D_r whatever s is; a step of rate
lr so moves weights as one of s lr (AdamW) or s^2 lr (SGD) would, and `sparse_train` sets a rate of its own. Singular
values are split evenly by default. Directions that D lacks begin as LoRA's do. A failed last round of stage 1 is
played again, and the seed is sent each round, since clients keep nothing.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from fedllm.blocks.lora import A, B, LoraPair, Split, digest, energy
from fedllm.blocks.sparse import PLACES, VALUES, dense, places, shapes
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Update
from fedllm.core.roster import Member
from fedllm.core.seeds import derive
from fedllm.core.server import Server
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, add
from fedllm.core.train import Train
from fedllm.core.work import Client

LITTLE = 0.3
"""A cut that keeps less of ||D||^2 is warned of."""


class SLoRA(Method):
    """Sparse training, an SVD, LoRA."""

    card = Card(
        title="SLoRA - a sparse stage gives LoRA a data-driven start",
        paper="Babakniya et al., FL@FM at NeurIPS 2023, arXiv:2308.06522",
        cells=("2.3 Parameter Efficiency",),
        travels="stage 1: the drawn entries of each weight and a seed; stage 2: LoRA factors",
        claim="A data-driven start puts federated LoRA ahead where clients differ much.",
        status="verified",
    )
    adapters = ("lora",)

    density: float = Field(0.01, gt=0, le=1)
    """Share of the entries of each adapted weight that stage 1 trains."""
    sparse_rounds: int | float = Field(0.1, ge=0)
    """Rounds of stage 1; below 1 a share of all rounds (at least one of them), 0 for plain LoRA."""
    sparse_train: Train | None = None
    """Local training in stage 1; null: as in stage 2."""
    split: Split = "both"
    """Where the singular values of D go: both - their roots into A and B; out - all into B."""

    async def prepare(self, server: Server, state: State) -> State:
        """Draw the entries; their values begin at 0."""
        rounds, share = server.rounds, 0 < self.sparse_rounds < 1
        first = min(max(1, round(self.sparse_rounds * rounds)), rounds - 1) if share else round(self.sparse_rounds)
        if first and first >= rounds:
            raise ConfigError(
                f"method.sparse_rounds={first} leaves no round for LoRA: the run has {rounds}.",
                f"Allowed: 0 to {rounds - 1}, or a share below 1.",
            )
        layers, seed = shapes(state.params), derive(server.seed, "sparse")
        if not first:
            return state
        found = places(layers, seed, self.density)
        values = {name + VALUES: torch.zeros(found[name + PLACES].shape) for name in layers}
        numbers = {"sparse_rounds": first, "sparse_seed": seed, "sparse_digest": digest(found)}
        return replace(state.with_(sparse=values), numbers={**state.numbers, **numbers})

    def distribute(self, state: State, client: Member) -> Received:
        """The values and the seed of their places; LoRA after the bridge."""
        if "sparse" not in state.memory:
            return Received(state.params, {"stage": 2})
        numbers = {"stage": 1, **{name: state.numbers[name] for name in ("sparse_seed", "sparse_digest")}}
        return Received(_trained(state), numbers)

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Train the entries (beside LoRA's first values, whose product is 0), or LoRA."""
        fixed = self._places(client, received)
        train = self.train if fixed is None else self.sparse_train or self.train
        report = await client.fit(received.params, train, fixed=fixed)
        return Upload(report.delta, weight=client.size, metrics=report.metrics)

    def expected(self, state: State) -> dict[str, Tensors]:
        """What was sent."""
        return {"update": _trained(state)}

    def finalize(self, state: State, update: Update) -> State:
        """The mean change; in the last round of stage 1 also the bridge."""
        new = add(_trained(state), update.params)
        if "sparse" not in state.memory:
            return state.with_(new)
        values = {name: new.pop(name) for name in state.memory["sparse"]}
        state = state.with_({**state.params, **new}, sparse=values)
        return self._bridge(state) if state.round + 1 >= state.numbers["sparse_rounds"] else state

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """The base with the entries, or with LoRA."""
        report = await client.score(received.params, fixed=self._places(client, received))
        return Upload(None, weight=client.size, metrics=report.metrics)

    def _bridge(self, state: State) -> State:
        """B A = D_r in place of D; the ordinary start where D is 0."""
        params, kept, whole = dict(state.params), 0.0, 0.0
        layers, values = shapes(params), state.memory["sparse"]
        found = places(layers, state.numbers["sparse_seed"], self.density)
        for name, shape in layers.items():
            change = dense(values[name + VALUES], found[name + PLACES], shape)
            parts, first = torch.linalg.svd(change, full_matrices=False), params[name + A]
            pair = LoraPair.from_svd(parts, first.shape[0], self.split, first)
            params[name + A], params[name + B] = pair.a, pair.b
            part, total = energy(parts[1], pair.rank)
            kept, whole = kept + part, whole + total
        share = kept / whole if whole else 1.0
        if share < LITTLE:
            text = f"SLoRA's bridge keeps {share:.0%} of what stage 1 learned: raise adapter.rank or method.density."
            warnings.warn(text, stacklevel=2)
        memory = {name: tree for name, tree in state.memory.items() if name != "sparse"}
        return replace(state, params=params, memory=memory, numbers={**state.numbers, "energy_kept": share})

    def _places(self, client: Client, received: Received) -> Tensors | None:
        """Where the received values lie; None in stage 2. Refuses a message of another stage or other places."""
        stage, sparse = received.numbers.get("stage"), any(name.endswith(VALUES) for name in received.params)
        if stage != (1 if sparse else 2):
            raise ConfigError(
                f"Client '{client.id}' was asked for stage {stage} with tensors of stage {1 if sparse else 2}.",
                "Stage 1 trains sparse entries, stage 2 LoRA from their bridge.",
                action="Send it the state of this round.",
            )
        if not sparse:
            return None
        found = places(shapes(client.initial()), int(received.numbers["sparse_seed"]), self.density)
        if digest(found) != received.numbers["sparse_digest"]:
            raise ConfigError(
                f"Client '{client.id}' drew other entries than the server.",
                "Both need the same model, adapter, method.density and version of NumPy.",
            )
        return found


def _trained(state: State) -> Tensors:
    """What clients train: values and a head in stage 1, LoRA and a head in stage 2."""
    sparse: Any = state.memory.get("sparse")
    return state.params if sparse is None else {**sparse, **_others(state.params)}


def _others(params: Tensors) -> Tensors:
    """What is no LoRA factor: a classifier's head."""
    return {name: tensor for name, tensor in params.items() if not name.endswith((A, B))}
