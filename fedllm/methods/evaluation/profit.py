"""Profit - federate a soft prompt, then let clients tune it further, and measure what each gains and forgets.

Stage 1 is FedAvg or FedSGD with SGD or Adam at the server. In stage 2 every client goes on from the global prompt; on
the way its personal score (own held-out rows) and its global score (rows of everybody, the same for all) are measured.
The command profit plays both and draws the frontier; the client half of stage 2 is :meth:`Profit.personal`, and it
works with whatever is trained, not only with prompts.

Deviations: no checkpoint is chosen by a score: the whole curve over steps is told, so nothing is picked on test rows.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field

from fedllm.blocks.adaptive_server import AdaptiveServer
from fedllm.core.card import Card
from fedllm.core.errors import RoundFailed
from fedllm.core.message import Received, Upload
from fedllm.core.method import on_client
from fedllm.core.reducer import Update
from fedllm.core.settings import read
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, add, norm, over, subtract
from fedllm.core.train import Train
from fedllm.core.work import Client


class Profit(AdaptiveServer):
    """Federated prompt tuning with a measured personalisation."""

    card = Card(
        title="Profit - personalisation against robustness of federated prompts",
        paper="Collins, Wu, Oh, Sim, FL@FM-NeurIPS 2023, arXiv:2310.04627",
        cells=("2.5 Benchmarks", "3.5 Multi-domain"),
        travels="down: the prompt; up: its change (FedAvg) or its gradient (FedSGD)",
        claim="Small local rates over more steps keep more of the global score for the same personal gain.",
        status="runs",
    )

    algorithm: Literal["fedavg", "fedsgd"] = "fedavg"
    """fedavg uploads what local training changed, fedsgd the gradient over all of a client's rows."""
    server: Literal["sgd", "adam"] = "sgd"
    """The server's optimiser."""
    server_lr: float = Field(1.0, gt=0)
    """The server's rate; 1 with fedavg and sgd is plain averaging, Adam wants about 0.01."""

    def idle(self) -> dict[str, str]:
        """Plain steps have no moments."""
        why = "It is an option of method.server=adam, and method.server is sgd"
        return dict.fromkeys(("beta1", "beta2", "tau", "convention"), why) if self.server == "sgd" else {}

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Local training, or minus the gradient."""
        if self.algorithm == "fedavg":
            return await super().work(client, received)
        gradient, loss = await client.gradient(received.params)
        return Upload(over(lambda g: -g, gradient), client.size, {"loss": loss})

    def second(self, v: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """b2 v + (1 - b2) d^2."""
        return self.beta2 * v + (1 - self.beta2) * d.square()

    def finalize(self, state: State, update: Update) -> State:
        """A step of the server's optimiser along the mean change."""
        if self.server == "adam":
            return super().finalize(state, update)
        return state.with_(add(state.params, update.params, self.server_lr))

    @on_client
    async def personal(self, client: Client, received: Received) -> Upload:
        """Stage 2: tune on from what was received, and score at the named points.

        `numbers` of what is received: `train` (options of :class:`~fedllm.core.train.Train`), `points` (steps, rising,
        0 allowed), `near` (weight of |q - p|^2 in the loss) and `mixes` (shares a of q in (1 - a) p + a q). Those of
        the upload: `rows`, one per point and mix, with the counts of `personal` and `global` and the distance |q - p|.
        A training that does not stay finite leaves p in place and is marked.
        """
        start, given = received.params, received.numbers
        pulled = bool(given["near"])
        extra: dict[str, Any] = (
            {"anchor": start, "near": {"near": torch.tensor(float(given["near"]))}} if pulled else {}
        )
        params, moments, done, diverged, rows = start, {}, 0, False, []
        for point in given["points"]:
            if point > done and not diverged:
                train = read(Train, {**given["train"], "steps": point - done, "epochs": None}, "train")
                try:
                    report = await client.fit(
                        params, train, self.pull if pulled else None, moments=moments, begun=done, **extra
                    )
                    params, moments, done = report.params, report.moments or {}, point
                except RoundFailed:
                    params, diverged = start, True
            for mix in given["mixes"]:
                mixed = params if mix == 1 else add(start, subtract(params, start), mix)
                own = (await client.score(mixed)).counts
                everybody = (await client.score(mixed, rows=client.rows("public"))).counts
                found = {"steps": point, "mix": mix, "diverged": diverged, "moved": norm(subtract(params, start))}
                rows.append({**found, "personal": own, "global": everybody})
        return Upload(None, client.size, numbers={"rows": rows})

    def pull(self, params: Tensors, start: Tensors, anchor: Tensors, near: Tensors) -> torch.Tensor:
        """near * |q - p|^2."""
        squares = [(q - p).square().sum() for q, p in zip(params.values(), anchor.values(), strict=True)]
        return near["near"] * torch.stack(squares).sum()
