"""FedProx - FedAvg with a pull towards the received weights, so that clients with other data drift less.

The pull acts on trainable tensors only and is squared: (mu / 2) * ||y - x||^2. mu = 0 is FedAvg to the last bit.

Deviations from the paper: every client takes its full number of steps. A client too slow for the round's deadline is
lost, where the paper would take its partial work.
"""

import torch
from pydantic import Field

from fedllm.core.card import Card
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.tensors import Tensors, squared_distance
from fedllm.core.work import Client


class FedProx(Method):
    """Federated averaging with a proximal term."""

    card = Card(
        title="FedProx - a proximal term against client drift",
        paper="Li et al., MLSys 2020, arXiv:1812.06127",
        cells=("2.4 Decentralized Training", "2.5 Frameworks"),
        travels="down: trainable tensors; up: their change and the number of examples",
        claim="Ends nearer to the optimum of the joint objective than FedAvg where clients differ.",
        status="verified",
    )

    mu: float = Field(0.01, ge=0)
    """Strength of the pull towards the received weights."""

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Local training with the proximal term."""
        report = await client.fit(received.params, self.train, penalty=self.pull)
        return Upload(report.delta, weight=client.size, metrics=report.metrics)

    def pull(self, params: Tensors, start: Tensors) -> torch.Tensor:
        """(mu / 2) * ||params - start||^2 (paper, equation 2)."""
        return 0.5 * self.mu * squared_distance(params, start)
