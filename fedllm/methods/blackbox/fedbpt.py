"""FedBPT - a soft prompt found by evolution: clients only run the model forward, and send a few hundred numbers.

Where a model can be asked but not trained, a prompt P(z) = A z + p0 is searched over z by CMA-ES: at every client on
its own data, and at the server over the clients, by the rank of their fitness. The fitness is the loss over the loss on
scrambled inputs, as a prompt that only learns how often labels occur lowers both.

Deviations: the scale of A is the deviation of the first prompt's numbers (which come from the embeddings), not that of
all embeddings. Words of a client's own texts stand in for random tokens. What travels of the server's strategy is its
mean, covariance and step size. A client's result too far from the mean to be a sample is drawn nearer by `cma`. One
reply becomes the mean; two, which `cma` refuses, move the mean only. `server=mean` is the paper's baseline FedAvg-BBT.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from fedllm.blocks.evolution import LEAST, Evolution, first_state, over_clients, searched, vectors
from fedllm.blocks.subspace import Subspace, ratio, scrambled
from fedllm.core.card import Card
from fedllm.core.message import Dense, Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Collect, Mean, Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.seeds import numpy_stream
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.work import Client

WORST = torch.finfo(torch.float64).max
"""The fitness of a client whose loss is not a number: finite, so that it may travel, and behind all others."""


class FedBPT(Method):
    """Black-box prompt tuning by CMA-ES on the clients and over the clients."""

    card = Card(
        title="FedBPT - black-box prompt tuning: CMA-ES on clients and over clients",
        paper="Sun, Xu, Yin, Yang, Xu, Liu, Du, Chen, Roth, ICML 2024, arXiv:2310.01467",
        cells=("2.4 Blackbox", "3.8 Blackbox", "Table 3 [53]"),
        travels="down: mean [d], covariance [d, d] and step size of the search; up: d + iterations + 2 numbers",
        claim="Without gradients, accuracy comparable to white-box tuning (0.876 on SST-2 with RoBERTa-large) for an "
        "upload 500,000 times smaller than the model.",
        models=("causal-lm", "masked-lm", "sequence-classification", "token-classification"),
        status="verified",
    )
    only_fits = feeds = False
    absolute = True
    adapters = ("prompt",)

    subspace: Subspace = Subspace()  # pyright: ignore[reportCallIssue]
    """Where the prompt is searched."""
    candidates: int = Field(5, ge=LEAST)
    """Prompts a client tries in one iteration."""
    iterations: int = Field(8, ge=1)
    """Iterations of a client's search in one round."""
    least_sigma: float = Field(0.5, ge=0)
    """The smallest step size of the clients' searches."""
    fitness: Literal["ratio", "loss"] = "ratio"
    """The loss over the loss on scrambled inputs, or the loss alone."""
    perturb: float = Field(0.5, gt=0, le=1)
    """Share of the words that are scrambled; with none the ratio would be 1 for every prompt."""
    floor: float = Field(1e-3, gt=0)
    """Smallest loss on scrambled inputs that the ratio divides by."""
    server: Literal["evolution", "mean"] = "evolution"
    """Recombine by rank with CMA-ES, or take the mean of the clients' results (FedAvg-BBT)."""

    def trainable(self, name: str) -> bool:
        """The prompt alone."""
        return name == "prompt"

    def init(self, start: Tensors) -> State:
        """The search begins at 0, which is the first prompt."""
        self.subspace.scale(start["prompt"])
        search = first_state(self.subspace.size, self.subspace.sigma) | vectors(local=[self.subspace.sigma])
        return State(start, {"search": search, "first": dict(start)})

    def distribute(self, state: State, client: Member) -> Received:
        """Where to search, how far, and (for evolution) in which directions."""
        search = state.memory["search"]
        sent = {"mean": search["mean"], "sigma": search["local"]}
        return Received(search=sent if self.server == "mean" else sent | {"C": search["C"]})

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Search on the client's own data; only forward passes."""
        search, first = received["search"], client.initial()["prompt"]
        rows = scrambled(client.rows(), self.perturb, client.rng("perturb")) if self.fitness == "ratio" else None

        async def measured(z: torch.Tensor) -> tuple[float, float]:
            params = {"prompt": self.subspace.prompt(z, first)}
            loss = (await client.score(params, "train")).values["loss"]
            other = 1.0 if rows is None else (await client.score(params, rows=rows)).values["loss"]
            return ratio(loss, other, self.floor), math.nan if loss is None else loss

        local = Evolution(search, self.candidates, client.rng("search"))
        sigmas, fitness, loss = await searched(local, self.iterations, measured)
        metrics = {"loss": (loss * client.size, float(client.size))} if math.isfinite(loss) else {}
        update = {"z": local.mean}
        if self.server == "evolution":
            worth = fitness if math.isfinite(fitness) else WORST
            update |= vectors(fitness=[worth], sigmas=sigmas, parents=[float(local.parents)])
        return Upload(update, weight=client.size, metrics=metrics)

    @property
    def reducer(self) -> Reducers:
        """Ranks need single uploads; the mean does not."""
        return Mean(self.weighting) if self.server == "mean" else Collect()

    def expected(self, state: State) -> dict[str, Tensors]:
        """d numbers; for evolution also a fitness, the step sizes and the number of parents."""
        sizes = {"z": self.subspace.size, "fitness": 1, "sigmas": self.iterations, "parents": 1}
        kept = list(sizes)[: 1 if self.server == "mean" else None]
        return {"update": {name: torch.zeros(sizes[name], dtype=torch.float64) for name in kept}}

    def finalize(self, state: State, update: Update) -> State:
        """One step of the server's strategy over the clients' results."""
        if self.server == "mean":
            search = {**state.memory["search"], "mean": update.params["z"]}
        else:
            replies = [part.tensors for part in update.collected["update"].values() if isinstance(part, Dense)]
            rng = numpy_stream(self.subspace.seed, "server", state.round)
            search = over_clients(state.memory["search"], replies, self.least_sigma, rng)
        prompt = self.subspace.prompt(search["mean"], state.memory["first"]["prompt"])
        return state.with_({"prompt": prompt}, search=search)

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """Measure the prompt at the mean."""
        prompt = self.subspace.prompt(received["search"]["mean"], client.initial()["prompt"])
        report = await client.score({"prompt": prompt})
        return Upload(None, weight=client.size, metrics=report.metrics)
