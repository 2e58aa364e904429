"""FedPepTAO - share the deep prompts of the useful layers only, and correct drift on the server, without extra traffic.

A prompt in every layer costs traffic in every layer, and drifts apart where clients differ. Before the first round
clients score their layers, and a spectrum of the loss says what share of them is worth sending; only those prefixes
travel, the others stay with the client. The server keeps a control variate for each client and a momentum
(fedllm/blocks/server_control.py), which client-side methods would send.

Deviations: the sum of the learning rates really used replaces steps * lr; the mass of the spectrum is that of its
points, not smoothed; scoring batches hold no row twice, and all layers are ranked (the published code skips the last).
The warm-up measures only: training begins at the first values, because clients could not be given warmed-up prefixes
of layers that do not travel. It runs in `prepare`, so that every upload of a round has one shape.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from fedllm.blocks.layer_choice import ChoosesLayers
from fedllm.blocks.server_control import Brought, mean_change, mean_correction, renewed_controls
from fedllm.core.card import Card
from fedllm.core.message import Dense, Received, Upload
from fedllm.core.method import on_client
from fedllm.core.reducer import Collect, Mean, Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, add, over, subtract, zeros
from fedllm.core.train import Train
from fedllm.core.work import Client

SPENT = {"spent": torch.zeros(3)}
"""What a client says of its training: weight, steps, sum of the learning rates."""


class FedPepTAO(ChoosesLayers):
    """Partial deep-prompt tuning with server-side momentum and control variates."""

    card = Card(
        title="FedPepTAO - partial deep-prompt tuning with corrections kept on the server",
        paper="Che et al., EMNLP 2023, arXiv:2310.15080",
        cells=("3.6 Parameter-efficient prompts", "Table 3 Parameter Efficient"),
        travels="down: prefixes of the shared layers; up: their change and three numbers (once: a score per layer)",
        claim="Sharing half of the layers costs no accuracy, and correction at the server makes training faster.",
        models=("causal-lm",),
        status="runs",
    )
    adapters = ("prefix",)
    private = ("personal",)

    train: Train = Train(lr=1e-2)  # pyright: ignore[reportCallIssue]
    """Local training; the optimiser begins afresh every round, as in the paper."""
    control: bool = True
    """Keep control variates; without them the mean is linear, and secure sums can form it."""
    gradient: Literal["difference", "pseudo"] = "difference"
    """What the momentum takes in: the last pseudo-gradient minus this one (published code), or this one."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """beta."""
    server_lr: float = Field(0.05, gt=0)
    """eta of the second round; it falls by 1 % a round, down to 1e-4."""

    def distribute(self, state: State, client: Member) -> Received:
        """The prefixes of the shared layers."""
        return Received(self.shared(state))

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Train all layers, and send the shared ones' change."""
        report = await client.fit(self._whole(client, received), self.train)
        own = {n: t for n, t in report.params.items() if n not in received.params}
        if own:
            client.private["personal"] = own
        delta, weight = {n: report.delta[n] for n in received.params}, self._weight(client)
        spent = {"spent": {"spent": torch.tensor([weight, float(report.steps), report.rate_sum])}}
        return Upload(delta, client.size, report.metrics, **(spent if self.control else {}))

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """The client's model: shared layers from the server, its own layers from its private store."""
        report = await client.score(self._whole(client, received))
        return Upload(None, client.size, report.metrics)

    def _whole(self, client: Client, received: Received) -> Tensors:
        """All prefixes: those received, the client's own, and first values where it has none yet."""
        return {**client.initial(), **(client.private.get("personal") or {}), **received.params}

    def _weight(self, client: Client) -> float:
        return float(client.size) if self.weighting == "examples" else 1.0

    @property
    def reducer(self) -> Reducers:
        """Single uploads, as a control variate is a client's own; a mean where there are none."""
        return {"update": Collect(), "spent": Collect()} if self.control else Mean(self.weighting)

    def expected(self, state: State) -> dict[str, Tensors]:
        """The shared prefixes."""
        return {"update": self.shared(state), **({"spent": SPENT} if self.control else {})}

    def finalize(self, state: State, update: Update) -> State:
        """Average, renew the control variates, and move on along momentum and correction (steps 6 and 7)."""
        memory, before = state.memory, self.shared(state)
        kept, correction = {}, zeros(before)
        if self.control:
            brought = _brought(update)
            if not brought:
                return state
            change, c = mean_change(brought), memory.get("control") or zeros(before)
            controls = {client: memory.get(f"control.{client}") or zeros(before) for client in brought}
            new, c = renewed_controls(brought, controls, c, update.clients / update.population)
            kept = {"control": c, **{f"control.{client}": own for client, own in new.items()}}
            correction = mean_correction(brought, {**controls, **new}, c)
        else:
            change = update.params
        pseudo, momentum = over(torch.neg, change), memory.get("momentum") or zeros(before)
        params = add(before, change)
        if "last" in memory:
            g = pseudo if self.gradient == "pseudo" else subtract(memory["last"], pseudo)
            momentum = over(lambda m, g, v: self.momentum * m + (1 - self.momentum) * g + v, momentum, g, correction)
            params = add(params, momentum, -self.rate(state.round + 1))
        return state.with_({**state.params, **params}, momentum=momentum, last=pseudo, **kept)

    def rate(self, round: int) -> float:
        """eta in a round, from 2."""
        return max(1e-4, self.server_lr * 0.99 ** (round - 2))


def _brought(update: Update) -> dict[str, Brought]:
    """What each client brought; one that says it weighs nothing is left out."""
    found = {}
    for client, part in update.collected["update"].items():
        spent = update.collected["spent"][client]
        if isinstance(part, Dense) and isinstance(spent, Dense):
            weight, steps, rates = spent.tensors["spent"].tolist()
            if weight > 0:
                found[client] = Brought(part.tensors, weight, steps, rates)
    return found
