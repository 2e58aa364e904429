"""FedBPT - a soft prompt found by evolution: clients only run the model forward, and send a few hundred numbers.

Where a model can be asked but not trained, a prompt P(z) = A z + p0 is searched over z by CMA-ES: at every client on
its own data, and at the server over the clients. The server's strategy recombines the clients' means by the rank of
their fitness; its step size is set to what the clients' searches had. The fitness is the loss over the loss on scrambled
inputs, as a prompt that only learns how often labels occur lowers both.

Deviations: the scale of A is the deviation of the first prompt's numbers, drawn from the embeddings, not theirs. Words
of a client's own texts stand in for random tokens. The received strategy is its mean, covariance and step size, not a
whole object. One reply is taken as the new mean; two, which `cma` refuses, are recombined without a new covariance.
`fedbpt-avg` (`server=mean`) is the paper's baseline FedAvg-BBT; it is linear.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from fedllm.blocks.evolution import LEAST, Evolution, first_state, positive_weights, ranked
from fedllm.blocks.subspace import prompt_at, scale_of, scrambled
from fedllm.core.card import Card
from fedllm.core.errors import ModelError
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
        claim="Without gradients, comparable accuracy to white-box prompt tuning (SST-2: 0.876 with RoBERTa-large) for a "
        "500,000 times smaller upload than the full model's.",
        models=("causal-lm", "masked-lm", "sequence-classification", "token-classification"),
        status="verified",
    )
    adapters = ("prompt",)

    size: int = Field(500, ge=2)
    """Dimensions d of the search."""
    candidates: int = Field(5, ge=LEAST)
    """Prompts a client tries in one iteration."""
    iterations: int = Field(8, ge=1)
    """Iterations of a client's search in one round."""
    sigma: float = Field(1.0, gt=0)
    """The first step size."""
    least_sigma: float = Field(0.5, ge=0)
    """The smallest step size of the clients' searches."""
    alpha: float = Field(1.0, gt=0)
    """Scale of the projection."""
    spread: float | None = Field(None, gt=0)
    """Deviation that the projection's scale is taken from; that of the first prompt's numbers where null."""
    seed: int = 0
    """The projection is drawn from it; it must be the same at every client."""
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
        scale_of(start["prompt"], self.alpha, self.sigma, self.spread)
        search = first_state(self.size, self.sigma) | {"local": torch.tensor([self.sigma]).double()}
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
        rng = client.rng("perturb")
        other = scrambled(client.rows(), self.perturb, rng) if self.fitness == "ratio" else None

        async def measured(z: torch.Tensor) -> tuple[float, float]:
            """Loss and fitness."""
            params = {"prompt": self._prompt(z, first)}
            loss = _loss((await client.score(params, "train")).values["loss"])
            if other is None:
                return loss, loss
            return loss, loss / max(self.floor, _loss((await client.score(params, rows=other)).values["loss"]))

        local, sigmas = Evolution(search, self.candidates, client.rng("search")), []
        for _ in range(self.iterations):
            tried = local.ask()
            found = [(await measured(z))[1] for z in tried]
            if not any(map(math.isfinite, found)):
                raise ModelError(f"No prompt that client '{client.id}' tried has a loss that is a number.")
            local.tell(tried, found)
            sigmas.append(local.sigma)
        loss, fitness = await measured(local.mean)
        metrics = {"loss": (loss * client.size, float(client.size))} if math.isfinite(loss) else {}
        update = {"z": local.mean}
        if self.server == "evolution":
            update |= _numbers(fitness=[fitness if math.isfinite(fitness) else WORST], sigmas=sigmas)
            update |= _numbers(parents=[local.parents])
        return Upload(update, weight=client.size, metrics=metrics)

    @property
    def reducer(self) -> Reducers:
        """Ranks need single uploads; the mean does not."""
        return Mean(self.weighting) if self.server == "mean" else Collect()

    def expected(self, state: State) -> dict[str, Tensors]:
        """d numbers; for evolution also a fitness, the step sizes and the number of parents."""
        sizes = {"z": self.size, "fitness": 1, "sigmas": self.iterations, "parents": 1}
        kept = list(sizes)[: 1 if self.server == "mean" else None]
        return {"update": {name: torch.zeros(sizes[name], dtype=torch.float64) for name in kept}}

    def finalize(self, state: State, update: Update) -> State:
        """One step of the server's strategy over the clients' results."""
        if self.server == "mean":
            search = {**state.memory["search"], "mean": update.params["z"]}
        else:
            replies = [part.tensors for part in update.collected["update"].values() if isinstance(part, Dense)]
            search = self._step(state, replies)
        return state.with_({"prompt": self._prompt(search["mean"], state.memory["first"]["prompt"])}, search=search)

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """Measure the prompt at the mean."""
        prompt = self._prompt(received["search"]["mean"], client.initial()["prompt"])
        report = await client.score({"prompt": prompt})
        return Upload(None, weight=client.size, metrics=report.metrics)

    def _step(self, state: State, replies: list[Tensors]) -> Tensors:
        """The strategy after it was told the clients' results, whatever their number."""
        search, count = state.memory["search"], len(replies)
        means, fitness = [reply["z"] for reply in replies], [float(reply["fitness"]) for reply in replies]
        if count < LEAST:
            order = sorted(range(count), key=ranked(fitness).__getitem__)
            weights = zip(positive_weights(count), order, strict=True)
            return {**search, "mean": sum((w * means[i] for w, i in weights), torch.zeros_like(means[0]))}
        sigma = _pooled(replies)
        rng = numpy_stream(self.seed, "server", state.round)
        strategy = Evolution({n: search[n] for n in search if n != "local"}, count, rng, count)
        strategy.tell(means, fitness, sigma)
        old = float(search["local"])
        local = min(old, max(self.least_sigma, strategy.sigma / sigma * old))
        return strategy.state() | _numbers(local=[local])

    def _prompt(self, z: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        return prompt_at(z, first, self.seed, scale_of(first, self.alpha, self.sigma, self.spread))


def _pooled(replies: list[Tensors]) -> float:
    """The step size of all the clients' iterations: sqrt(sum_k sum_i sigma_ki^2 / (m mu))."""
    squares = [float(reply["sigmas"].square().sum() / reply["parents"]) for reply in replies]
    return math.sqrt(sum(squares) / len(squares))


def _numbers(**values: list[float]) -> Tensors:
    return {name: torch.tensor(each, dtype=torch.float64) for name, each in values.items()}


def _loss(value: float | None) -> float:
    return math.nan if value is None else value
