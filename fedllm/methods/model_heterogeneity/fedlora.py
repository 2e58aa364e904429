"""FedLoRA - personal model = shared weights + private low-rank weights, trained one after the other.

Splitting a network into shared and private layers mixes general and personal knowledge inside each layer. Here every
layer is theta_k = sigma + tau_k: sigma is averaged, tau_k is a LoRA that never leaves its client. It is trained first,
so that it takes up what is special about the client and the gradient left for sigma is closer to everybody's.

Deviations: sigma is the paper's full weights with adapter.kind=full, or a shared LoRA, so that uploads stay small. A
norm keeps no statistics here. A client without tau trains one before it is measured. A tau that does not stay finite
begins anew (metric `private_resets`). A client's batches are one stream, so that the two phases see different ones.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from fedllm.core.card import Card
from fedllm.core.errors import ConfigError, RoundFailed
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.work import Client, FitReport

PRIVATE = (".personal.lora_A", ".personal.lora_B")


class FedLoRA(Method):
    """Shared weights plus a private LoRA."""

    card = Card(
        title="FedLoRA - a shared model with a private low-rank part at each client",
        paper="Wu et al., ACM MM 2024 (FedDecomp), arXiv:2406.19931; OpenReview bZh06ptG9r",
        cells=("2.3 Parameter Efficiency", "3.6 Low-rank Adaptation", "4.1 Real-world Deployment"),
        travels="down and up: the shared trainable tensors (all weights with adapter.kind=full); nothing private",
        claim="Where clients disagree it beats one shared model, and private weights trained first beat shared first.",
        status="verified",
    )
    private = ("tau",)
    adapters = ("lora", "full", "head")
    only_fits = False
    """A measurement trains a private part for a client that has none."""

    weighting: Literal["examples", "uniform"] = "uniform"
    """The paper's mean is uniform."""
    rank: int = Field(4, ge=0)
    """Rank of the private LoRA; 0 for none, which is FedAvg."""
    share: float = Field(0.4, ge=0, lt=1)
    """Share of the local steps (or epochs) that the private part gets; the paper's is 2 of 5."""
    order: Literal["private-first", "shared-first", "together"] = "private-first"
    """Which part is trained first; together trains both in every step."""

    @model_validator(mode="after")
    def _both_parts(self) -> FedLoRA:
        unit, whole, first = self._split()
        if self.rank and self.share and self.order != "together" and not 0 < first < whole:
            raise ConfigError(
                f"method.share={self.share} of {whole} local {unit} leaves {first} for the private part.",
                f"From 1 to {whole - 1} must be." if whole > 1 else "At least 2 are needed: one for each part.",
                action=f"Raise train.{unit} or change method.share.",
            )
        return self

    def adapter(self) -> dict[str, Any]:
        """A second LoRA on every adapted layer."""
        return {"personal": self.rank}

    def init(self, start: Tensors) -> State:
        """sigma."""
        shared = _part(start, private=False)
        if self.rank and len(shared) == len(start):
            raise ConfigError(
                "FedLoRA found no private part: no trainable tensor is called '*.personal.lora_A'.",
                action=f"Set adapter.personal={self.rank}, or method.rank=0.",
            )
        return State(shared)

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """tau against a frozen sigma, then sigma against a frozen tau; sigma's change is uploaded."""
        sigma, tau, extra = received.params, self._own(client), {}
        if self.order == "together":
            report = await client.fit({**sigma, **tau}, self.train)
            client.private["tau"] = _part(report.params, private=True)
            return Upload(_part(report.delta, private=False), client.size, report.metrics)
        if self.order == "private-first":
            tau, extra = await self._personal(client, sigma, tau)
        report = await self._phase(client, sigma, tau, private=False)
        if self.order == "shared-first":
            tau, extra = await self._personal(client, report.params, tau)
        client.private["tau"] = tau
        return Upload(report.delta, client.size, {**report.metrics, **extra})

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """sigma + tau; a client that has none yet trains one for this measurement and forgets it."""
        sigma, tau = received.params, self._own(client)
        if "tau" not in client.private and self.order != "together":
            tau, _ = await self._personal(client, sigma, tau)
        report = await client.score(sigma, fixed=tau)
        return Upload(None, weight=client.size, metrics=report.metrics)

    def _own(self, client: Client) -> Tensors:
        """The client's tau; its first value is zero, since B is."""
        return dict(client.private.get("tau") or _part(client.initial(), private=True))

    async def _personal(
        self, client: Client, sigma: Tensors, tau: Tensors
    ) -> tuple[Tensors, dict[str, tuple[float, float]]]:
        """A trained tau; its first value where training did not stay finite, and then a metric that says so."""
        if not tau or not self.share:
            return tau, {}
        try:
            return (await self._phase(client, tau, sigma, private=True)).params, {}
        except RoundFailed:
            return _part(client.initial(), private=True), {"private_resets": (1.0, 1.0)}

    async def _phase(self, client: Client, moving: Tensors, still: Tensors, private: bool) -> FitReport:
        """Train one part with an optimiser of its own, on the batches behind those of the other part."""
        unit, whole, first = self._split()
        if not self.rank or not first:
            return await client.fit(moving, self.train, fixed=still)
        count = first if private else whole - first
        before = 0 if private == (self.order == "private-first") else whole - count
        one = self.train.model_copy(update={unit: 1}).step_count(client.size)
        begun = (max(client.round - 1, 0) * whole + before) * one
        return await client.fit(moving, self.train.model_copy(update={unit: count}), fixed=still, begun=begun)

    def _split(self) -> tuple[str, int, int]:
        """Steps or epochs, how many there are, and how many of them are the private part's."""
        unit = "steps" if self.train.epochs is None else "epochs"
        whole = self.train.epochs or self.train.step_count(1)
        return unit, whole, round(self.share * whole)


def _part(tensors: Tensors, private: bool) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(PRIVATE) == private}
