"""pFedLoRA - clients with models of their own share one small low-rank bridge, trained in turn with the model.

Models of different width and depth cannot be averaged. Every client runs its own F_k, and beside its output layer the
same small pair theta = (A, B): o+(x) = o(x) + B A P_k h(x), where h is what enters the output layer and P_k maps it to
the common width. F_k learns with theta frozen, from the loss with and without the bridge, then theta with F_k frozen.

Deviations: the survey calls it FedLoRA, a name that fedlora has. P_k belongs to F_k and is trained with it. Rank 0 is
refused (that is the method local). There is no global model: each client's own is measured, beside the mean bridge;
the paper has the client's last bridge there, which made no difference here, and nothing that travels is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import Client

A, B = "bridge.lora_A", "bridge.lora_B"


class PFedLoRA(Method):
    """Private models and a shared low-rank bridge."""

    card = Card(
        title="pFedLoRA - clients with different models share one small low-rank adapter",
        paper="Yi et al., 2023, arXiv:2310.13283",
        cells=("2.1 Personalization and Model Heterogeneity",),
        travels="down and up: the bridge, r (e + C) numbers whatever the client's model",
        claim="Clients with different models gain from each other through the bridge alone (at most 1.35 points).",
        status="runs",
    )
    only_fits = False
    private = ("model",)
    mixes = ("models",)

    rank: int = Field(8, ge=1)
    """Rank of the bridge."""
    width: int = Field(128, ge=1)
    """Common width at which the bridge reads hidden states; the paper's is 500."""
    mu: float = Field(0.5, ge=0, le=1)
    """Weight of the loss with the bridge while the model learns; the rest is the loss without."""
    bridge_train: Train | None = None
    """Local training of the bridge; null: as long and as fast as the model's."""

    def adapter(self) -> dict[str, Any]:
        """The bridge beside the output layer."""
        return {"bridge": self.rank, "bridge_width": self.width}

    def init(self, start: Tensors) -> State:
        """theta, with B = 0."""
        if not {A, B} <= start.keys():
            raise ConfigError(
                f"pFedLoRA found no bridge: no trainable tensor is called '{A}'.",
                action=f"Set adapter.bridge={self.rank}.",
            )
        return State({A: start[A], B: start[B]})

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """F_k against a frozen theta, then theta against a frozen F_k; theta's change is uploaded."""
        theta = received.params
        paths = ((1 - self.mu, {B: torch.zeros_like(theta[B])}), (self.mu, {}))
        terms = [(weight, tensors) for weight, tensors in paths if weight]
        model = (await client.fit(self._own(client), self.train, fixed=theta, terms=terms)).params
        report = await client.fit(theta, self.bridge_train or self.train, fixed=model)
        client.private["model"] = model
        return Upload(report.delta, client.size, report.metrics)

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """The full path: the client's model beside the bridge."""
        report = await client.score(self._own(client), fixed=received.params)
        return Upload(None, weight=client.size, metrics=report.metrics)

    def _own(self, client: Client) -> Tensors:
        """F_k: everything but the bridge."""
        kept = client.private.get("model") or client.initial()
        return {name: tensor for name, tensor in kept.items() if name not in (A, B)}
