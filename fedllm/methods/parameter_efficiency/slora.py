"""SLoRA - a few rounds of sparse weight training give LoRA a start that the data chose.

LoRA from B = 0 lags behind full fine-tuning where clients differ. In stage 1 a few entries of each adapted weight are
trained, drawn once for all clients from a seed, and averaged. Then the bridge: what they changed, D, is cut by SVD to
the rank of LoRA and the base is as it was. Stage 2 is federated LoRA from there.

Deviations: entries are kept in units of LoRA's scale s, so that the bridge is B A = D_r whatever s is; a step of rate
lr so moves weights as one of s lr (AdamW) or s^2 lr (SGD) would, and `sparse_train` sets a rate of its own. Directions
that D lacks begin as LoRA's do. The seed is sent in each round of stage 1, and a last one that failed is played again.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from fedllm.blocks.lora import A, B, Split, digest
from fedllm.blocks.sparse import PLACES, VALUES, agreed, bridge, places, shapes
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

LITTLE = 0.3  # a cut that keeps less of ||D||^2 is warned of; random places make D nearly full in rank


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
    sparse_rounds: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Rounds of stage 1; below 1 a share of all rounds (at least one of them), 0 for plain LoRA."""
    sparse_train: Train | None = None
    """Local training in stage 1; null: as in stage 2."""
    split: Split = "both"
    """Where the singular values of D go: both - their roots into A and B; out - all into B."""

    async def prepare(self, server: Server, state: State) -> State:
        """Draw the entries; their values begin at 0."""
        rounds, first = server.rounds, self.sparse_rounds
        first = first if isinstance(first, int) else min(max(1, round(first * rounds)), rounds - 1)
        if first >= max(rounds, 1):
            what = f"method.sparse_rounds={first} leaves no round for LoRA: the run has {rounds}."
            raise ConfigError(what, f"Allowed: 0 to {rounds - 1}, or a share below 1.")
        if not first:
            return state
        seed = derive(server.seed, "sparse")
        found = places(shapes(state.params), seed, self.density)
        values = {name.removesuffix(PLACES) + VALUES: torch.zeros(at.shape) for name, at in found.items()}
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
        fixed, first = self._places(client, received), self.sparse_train or self.train
        report = await client.fit(received.params, self.train if fixed is None else first, fixed=fixed)
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

    def weights(self, state: State, start: Tensors) -> Tensors:
        """In stage 1 what the bridge would make of it: a run that is stopped there has learned that."""
        return self._bridge(state).params if "sparse" in state.memory else state.params

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """The base with the entries, or with LoRA."""
        report = await client.score(received.params, fixed=self._places(client, received))
        return Upload(None, weight=client.size, metrics=report.metrics)

    def _bridge(self, state: State) -> State:
        """B A = D_r in place of D; the ordinary start where D is 0."""
        found = places(shapes(state.params), state.numbers["sparse_seed"], self.density)
        params, share = bridge(state.params, state.memory["sparse"], found, self.split)
        if share < LITTLE:
            warnings.warn(f"SLoRA's bridge keeps {share:.0%} of ||D||^2: raise adapter.rank.", stacklevel=2)
        memory = {name: tree for name, tree in state.memory.items() if name != "sparse"}
        return replace(state, params=params, memory=memory, numbers={**state.numbers, "energy_kept": share})

    def _places(self, client: Client, received: Received) -> Tensors | None:
        """Where the received values lie; None in stage 2. Refuses a message of another stage or other places."""
        stage, sparse = received.numbers.get("stage"), any(name.endswith(VALUES) for name in received.params)
        if stage != (1 if sparse else 2):
            raise ConfigError(
                f"Client '{client.id}' was asked for stage {stage} with tensors of stage {1 if sparse else 2}.",
                "Stage 1 trains sparse entries, stage 2 LoRA from their bridge.",
            )
        if not sparse:
            return None
        layers, numbers = shapes(client.initial()), received.numbers
        return agreed(layers, int(numbers["sparse_seed"]), self.density, numbers["sparse_digest"], client.id)


def _trained(state: State) -> Tensors:
    """What clients train: values and a head in stage 1, LoRA and a head in stage 2."""
    if "sparse" not in state.memory:
        return state.params
    return {**state.memory["sparse"], **{n: t for n, t in state.params.items() if not n.endswith((A, B))}}
