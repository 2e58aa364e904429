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

from fedllm.blocks.lora import A, B, LoraPair, Split, energy
from fedllm.blocks.ranks import MixedRanks, ProductMean, factors, largest_rank, widened
from fedllm.core.card import Card
from fedllm.core.message import Received, Upload
from fedllm.core.method import on_client
from fedllm.core.reducer import Reducers, Update
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.work import Client


class FlexLoRA(MixedRanks):
    """Averaged products, redistributed by SVD."""

    card = Card(
        title="FlexLoRA - LoRA of different ranks, averaged as products and cut by SVD",
        paper="Bai et al., NeurIPS 2024, arXiv:2402.11505",
        cells=("2.1 Personalization and Model Heterogeneity", "2.3 Parameter Efficiency"),
        travels="down: the first r_k singular directions; up: A_k and B_k, r_k (o + i) numbers a layer",
        claim="With mixed ranks it beats both the smallest rank for all and zero-padded averaging of factors.",
        status="verified",
    )

    split: Split = "out"
    """Where singular values go: out - all into B, as in the published code; both - their roots into A and B."""

    def init(self, start: Tensors) -> State:
        """The ordinary start, A random and B = 0; A is kept for directions that begin afresh."""
        first = super().init(start)
        return first.with_(start={name: tensor for name, tensor in start.items() if name.endswith(A)})

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Ordinary LoRA training from the slice; the factors themselves are uploaded."""
        report = await client.fit(received.params, self.train)
        return Upload(factors(report.params), weight=client.size, metrics=report.metrics)

    @property
    def reducer(self) -> Reducers:
        """The mean of the products. It is not linear in the factors: a secure sum would need dense products."""
        return ProductMean(self.weighting)

    def finalize(self, state: State, update: Update) -> State:
        """D cut to the largest rank; smaller ranks are its first rows and columns."""
        params, rank, kept, whole = {**state.params}, largest_rank(state.params), 0.0, 0.0
        mean = update.params
        params.update({name: tensor for name, tensor in mean.items() if not name.endswith((A, B))})
        for name, pair in widened(mean, params).items():
            parts = pair.svd()
            part, total = energy(parts[1], rank)
            kept, whole = kept + part, whole + total
            cut = LoraPair.from_svd(parts, rank, self.split, state.memory["start"][name + A])
            params[name + A], params[name + B] = cut.a, cut.b
        numbers = {**state.numbers, "energy_kept": kept / whole if whole else 1.0}
        return replace(state.with_(params), numbers=numbers)
