"""Layer choice - before the first round: which layers' deep prompts are worth sending (FedPepTAO, 2310.15080, 4.1).

Every client scores the layers on one batch without prompts; the layers are ranked by the mean score. How many are taken
is given, or read off the spectrum of the loss after a warm-up of plain averaging. All that travels is a number per
layer, the warm-up's prompts, and one number. It happens in `prepare`, so that every upload of a round has one shape.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from fedllm.blocks.ask_mean import ask_mean
from fedllm.blocks.curvature import client_spectrum, stable_mass
from fedllm.blocks.layers import best_layers, distinct, spread_score
from fedllm.blocks.prompts import depth, of_layers
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.seeds import numpy_stream
from fedllm.core.server import Server
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, add, zeros
from fedllm.core.work import Client


class ChoosesLayers(Method, abstract=True):
    """Keeps in `state.numbers`: `shared` (the chosen layers, ascending), `share` and `scores` (one per layer)."""

    asks = ("score_layers", "warm", "measure_share")
    only_fits = False

    share: float | None = Field(None, gt=0, le=1)
    """Share of the layers to send; null measures it on the spectrum of the loss after the warm-up."""
    warm_up: int = Field(10, ge=1)
    """Rounds of averaging before the spectrum is taken."""
    lanczos: int = Field(50, ge=1)
    """Products with the Hessian for a client's spectrum."""
    score_rows: int = Field(8, ge=2)
    """Rows of a client's scoring batch, and of the loss whose spectrum is taken."""

    def idle(self) -> dict[str, str]:
        """A share that is given needs no spectrum."""
        why = "It is for measuring the share of the layers, and method.share is given"
        return {} if self.share is None else {"warm_up": why, "lanczos": why}

    async def prepare(self, server: Server, state: State) -> State:
        """Choose the layers: rank them, and take as many as the spectrum of the loss says."""
        layers = depth(state.params)
        asked = {client: Received(numbers={"layers": layers}) for client in server.clients}
        found = await ask_mean(server, self.score_layers, asked, {"scores": torch.zeros(layers, dtype=torch.float64)})
        scores = found["scores"].tolist() if found else [0.0] * layers
        share = self.share or await self._measured_share(server, state)
        numbers = {"shared": best_layers(scores, share), "share": share, "scores": scores}
        return replace(state, numbers={**state.numbers, **numbers})

    async def _measured_share(self, server: Server, state: State) -> float:
        """After the warm-up, the mean over its last cohort of what their spectra keep; 1 where nobody could tell."""
        params, size, cohort = state.params, int(state.numbers.get("cohort", len(server.clients))), []
        for number in range(self.warm_up):
            cohort = self.cohort(0, server.clients, size, numpy_stream(server.seed, "warm-up", number))
            asked = {client: Received(params, {"number": number}) for client in cohort}
            params = add(params, await ask_mean(server, self.warm, asked, params, self.weighting) or zeros(params))
        asked = {client: Received(params) for client in cohort}
        found = await ask_mean(server, self.measure_share, asked, {"share": torch.zeros(1)}, "uniform")
        return float(found["share"]) if found else 1.0

    @on_client
    async def score_layers(self, client: Client, received: Received) -> Upload:
        """A score for each layer, on one batch without prompts; a batch of one row says nothing and weighs nothing."""
        rows = distinct(client.rows(), self.score_rows, client.rng("scores"))
        if len(rows) < 2:
            return Upload({"scores": torch.zeros(received.numbers["layers"], dtype=torch.float64)}, 0.0)
        states = await client.hidden(None, rows)
        scores = torch.tensor([spread_score(layer) for layer in states[1:]], dtype=torch.float64)
        return Upload({"scores": scores}, client.size)

    @on_client
    async def warm(self, client: Client, received: Received) -> Upload:
        """A round of averaging: batches go on where the last warm-up round left off."""
        begun = received.numbers["number"] * self.train.step_count(client.size)
        report = await client.fit(received.params, self.train, begun=begun)
        return Upload(report.delta, client.size)

    @on_client
    async def measure_share(self, client: Client, received: Received) -> Upload:
        """The mass of the spectrum that stays where its bound no longer matters."""
        rows = distinct(client.rows(), self.score_rows, client.rng("spectrum"))
        density = await client_spectrum(client, received.params, rows, self.lanczos, client.rng("lanczos"))
        return Upload({"share": torch.tensor([stable_mass(density)]).clamp(0, 1)}, client.size)

    @staticmethod
    def shared(state: State) -> Tensors:
        """The prefixes of the chosen layers, and all tensors of no layer; everything before the choice."""
        chosen = state.numbers.get("shared")
        return dict(state.params) if chosen is None else of_layers(state.params, chosen)
