"""FlexLoRA - clients train LoRA of different ranks; the server averages the products B A and cuts them by SVD.

With one rank everybody is held to the weakest device, and the mean of factors is not the mean of products. Here the
server forms D = sum p_k B_k A_k (as one pair of rank sum r_k, nothing dense), and gives every client the first r_k
singular directions. Clients of small ranks so gain from those of large ones.

Deviations: one scale for all ranks (alpha / largest rank) in place of alpha / r, with which ranks train at different
effective rates. Where the cohort's ranks sum to less than the largest, the directions left over begin afresh (a row of
the first A beside B = 0) in place of arbitrary null vectors. Nothing is kept of a client's optimiser.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from fedllm.blocks.lora import A, B, LoraPair, Split, Svd, energy
from fedllm.blocks.ranks import PRODUCT, MixedRanks, ProductMean, factors, largest_rank, products, widened
from fedllm.core.card import Card
from fedllm.core.message import Received, Upload
from fedllm.core.method import on_client
from fedllm.core.reducer import Mean, Reducers, Update
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.work import Client


class FlexLoRA(MixedRanks):
    """Averaged products, redistributed by SVD."""

    card = Card(
        title="FlexLoRA - LoRA of different ranks, averaged as products and cut by SVD",
        paper="Bai et al., NeurIPS 2024, arXiv:2402.11505",
        cells=("2.1 Personalization and Model Heterogeneity", "2.3 Parameter Efficiency"),
        travels="down: the first r_k singular directions; up: A_k and B_k, r_k (o + i) numbers a layer, or o i",
        claim="With mixed ranks it beats both the smallest rank for all and zero-padded averaging of factors.",
        status="verified",
    )

    split: Split = "out"
    """Where singular values go: out - all into B, as in the published code; both - their roots into A and B."""
    upload: Literal["factors", "products"] = "factors"
    """What travels up: the factors, or B A of each layer, which is larger and can be summed unseen."""

    def init(self, start: Tensors) -> State:
        """The ordinary start, A random and B = 0; A is kept for directions that begin afresh."""
        first = super().init(start)
        return first.with_(start={name: tensor for name, tensor in start.items() if name.endswith(A)})

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Ordinary LoRA training from the slice; the factors themselves are uploaded, or their products."""
        report = await client.fit(received.params, self.train)
        sent = factors(report.params) if self.upload == "factors" else products(report.params)
        return Upload(sent, weight=client.size, metrics=report.metrics)

    @property
    def reducer(self) -> Reducers:
        """The mean of the products. It is not linear in the factors, only in products."""
        return ProductMean(self.weighting) if self.upload == "factors" else Mean(self.weighting)

    def expected(self, state: State) -> dict[str, Tensors]:
        """The pairs, or their products."""
        return {"update": state.params if self.upload == "factors" else products(state.params)}

    def finalize(self, state: State, update: Update) -> State:
        """D cut to the largest rank; smaller ranks are its first rows and columns."""
        params, rank, kept, whole = {**state.params}, largest_rank(state.params), 0.0, 0.0
        mean = update.params
        params.update({name: tensor for name, tensor in mean.items() if not name.endswith((A, B, PRODUCT))})
        for name, parts in self._directions(mean, params).items():
            part, total = energy(parts[1], rank)
            kept, whole = kept + part, whole + total
            cut = LoraPair.from_svd(parts, rank, self.split, state.memory["start"][name + A])
            params[name + A], params[name + B] = cut.a, cut.b
        numbers = {**state.numbers, "energy_kept": kept / whole if whole else 1.0}
        return replace(state.with_(params), numbers=numbers)

    def _directions(self, mean: Tensors, params: Tensors) -> dict[str, Svd]:
        """The singular value decomposition of every layer's mean product."""
        if self.upload == "factors":
            return {name: pair.svd() for name, pair in widened(mean, params).items()}
        names = [name for name in mean if name.endswith(PRODUCT)]
        return {name.removesuffix(PRODUCT): torch.linalg.svd(mean[name], full_matrices=False) for name in names}
