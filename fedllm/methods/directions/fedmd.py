"""FedMD - parties with different, secret models teach each other through class scores on public rows.

Where everybody designs a model of their own there are no weights to average. The parties score the same public rows,
the mean of their logits is what they all learn (digest), and then each goes on with its own rows (revisit).

Deviations: a round is cut elsewhere, in the same order of steps: a client digests the consensus of the round before,
revisits its own rows and scores the next subset; its first round is the transfer start. Epochs are fixed, not stopped
early; `student=true` adds FedDF's server model (Lin et al., 2006.07242).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from fedllm.blocks.distil import ClippedMean, aligned, at_server, described, public_rows, scores
from fedllm.core.card import Card
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.seeds import derive
from fedllm.core.server import Server
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, add
from fedllm.core.train import Train
from fedllm.core.work import Client, FitReport


class FedMD(Method):
    """Federated model distillation."""

    card = Card(
        title="FedMD - different models learn from the mean of their class scores on public rows",
        paper="Li, Wang, NeurIPS workshop 2019, arXiv:1910.03581",
        cells=("4.5 Capacity-Augmented FL",),
        travels="down: a seed and the mean logits; up: n C logits, whatever the client's model",
        claim="Clients reach more than alone with the same work, and not more than with all private data pooled.",
        models=("sequence-classification",),
        status="verified",
    )
    asks, only_fits, feeds = ("describe", "learn"), False, False
    private = ("model", "digest", "revisit")
    mixes = ("models",)
    public = True

    weighting: Literal["examples", "uniform"] = "uniform"
    """The paper's mean of logits is uniform."""
    transfer: Train = Train(epochs=5, batch_size=32)  # pyright: ignore[reportCallIssue]
    """A client's first training, on the public rows with their labels."""
    own: Train = Train(epochs=5, batch_size=8)  # pyright: ignore[reportCallIssue]
    """Its training on its own rows right after; `train` is that of later rounds."""
    digest: Train = Train(epochs=1, batch_size=32)  # pyright: ignore[reportCallIssue]
    """Training on the public rows and the mean logits."""
    subset: int = Field(5000, ge=1)
    """Public rows that are scored in a round."""
    limit: float = Field(30.0, gt=0)
    """Logits are clipped to +-limit, so that no party carries the mean away."""
    student: bool = False
    """Whether the server trains a model of its own on the mean logits."""

    def init(self, start: Tensors) -> State:
        """Nothing in common but, on request, the server's student."""
        return State(start if self.student else {})

    async def prepare(self, server: Server, state: State) -> State:
        """The server looks at its own copy of the public rows: their fingerprint, and the shape of scores."""
        found = (await at_server(server, self.describe, Received())).numbers
        return replace(state, numbers={**state.numbers, **found, "seed": derive(server.seed, "fedmd"), "scored": 0})

    @on_client
    async def describe(self, client: Client, received: Received) -> Upload:
        """At the server: which public rows, how many, how many classes."""
        return Upload(None, numbers=await described(client))

    def distribute(self, state: State, client: Member) -> Received:
        """Which rows to score now, and the consensus on those of an earlier round."""
        return Received(None, {**state.numbers, "round": state.round + 1}, **state.memory)

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Digest and revisit (or the transfer start), then score the next subset."""
        numbers, model = received.numbers, client.private.get("model")
        rows = public_rows(client, numbers["rows"])
        if model is None:
            model = (await client.fit(client.initial(), self.transfer, rows=rows)).params
            report = await client.fit(model, self.own)
        else:
            if numbers["scored"]:
                report = await self._digest(client, model, received)
                model, client.private["digest"] = report.params, report.moments or {}
            report = await client.fit(model, self.train, moments=client.private.get("revisit") or {})
            client.private["revisit"] = report.moments or {}
        client.private["model"] = report.params
        outputs = await client.outputs(report.params, aligned(rows, numbers["seed"], numbers["round"], self.subset))
        return Upload(None, client.size, report.metrics, logits={numbers["rows"]: scores(outputs, self.limit)})

    @property
    def reducer(self) -> Reducers:
        """The mean of the logits of those who answered."""
        return {"logits": ClippedMean(self.weighting, self.limit)}

    def expected(self, state: State) -> dict[str, Tensors]:
        """One matrix [n, C], named by the public rows it belongs to."""
        shape = min(self.subset, state.numbers["total"]), state.numbers["classes"]
        return {"logits": {state.numbers["rows"]: torch.empty(shape, device="meta")}}

    def finalize(self, state: State, update: Update) -> State:
        """The consensus, the round whose subset it belongs to, and how many gave it."""
        numbers = {**state.numbers, "scored": state.round + 1, "parties": update.clients}
        return State(state.params, {"consensus": update["logits"]}, numbers, state.round)

    async def refine(self, server: Server, state: State) -> State:
        """The student, where there is one, learns the consensus."""
        if not self.student:
            return state
        learnt = await at_server(server, self.learn, Received(state.params, state.numbers, **state.memory))
        return state.with_(add(state.params, learnt.update))

    @on_client
    async def learn(self, client: Client, received: Received) -> Upload:
        """At the server: KL divergence to the softmax of the mean logits, as FedDF has it."""
        report = await self._digest(client, received.params, received, student=True)
        return Upload(report.delta, metrics=report.metrics)

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """The client's own model."""
        report = await client.score(client.private.get("model") or client.initial())
        return Upload(None, weight=client.size, metrics=report.metrics)

    async def _digest(self, client: Client, model: Tensors, received: Received, student: bool = False) -> FitReport:
        """Train on the rows that were scored, towards their mean logits."""
        numbers, (soft,) = received.numbers, received["consensus"].values()
        rows = aligned(client.rows("public"), numbers["seed"], numbers["scored"], self.subset)
        loss, moments = ("kl", None) if student else ("mae", client.private.get("digest") or {})
        return await client.fit(model, self.digest, rows=rows, targets=list(soft), loss=loss, moments=moments)
