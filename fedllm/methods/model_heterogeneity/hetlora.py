"""HETLORA - LoRA of different ranks by truncation; ranks shrink where data needs less, and large updates weigh more.

A client of rank r gets the first r rows of A and columns of B. Its loss holds lambda |B[:, c:r]| |A[c:r]| over all
layers, c = floor(gamma r); where training made that tail smaller, the client keeps rank c from then on. The server
pads with zeros and sums, each client weighted by the norm of its products ("sparsity" in the paper).

Deviations: one scale for all ranks (the published port's sqrt(alpha / r) trick serves the same end). Rows and columns
that nobody in the cohort owns stay as they were: padded with zeros in A and in B they could never learn again. The
tail never reaches below the least rank. Ranks lie at the server (`state.numbers`), so a client keeps nothing. The
weights depend on the uploads: nothing is linear, and a secure sum needs two phases (see NormMean).
"""

from __future__ import annotations

from dataclasses import replace
from math import floor

import torch
from pydantic import Field

from fedllm.blocks.lora import A, B, rank_view
from fedllm.blocks.ranks import MixedRanks, NormMean, factors, largest_rank
from fedllm.core.card import Card
from fedllm.core.message import Received, Scalars, Upload
from fedllm.core.method import on_client
from fedllm.core.reducer import Collect, OwnedSum, Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.work import Client


class HetLoRA(MixedRanks):
    """Truncation, self-pruning of ranks and weights by norm."""

    card = Card(
        title="HETLORA - different ranks by truncation, with self-pruning and weights by norm",
        paper="Cho et al., EMNLP 2024, arXiv:2401.06432",
        cells=("2.1 Personalization and Model Heterogeneity",),
        travels="down: the first r_k rows of A and columns of B; up: the same, trained, and r_k",
        claim="Ranks shrink to what a client's data needs, so that less travels, and idle clients weigh nothing.",
        status="verified",
    )

    gamma: float = Field(0.99, gt=0, le=1)
    """Share of a rank that is left when it is pruned; 1 turns pruning off."""
    decay: float = Field(1e-3, ge=0)
    """lambda: how strongly the tail of a rank is pulled towards zero."""
    least: int = Field(1, ge=1)
    """The smallest rank that pruning leaves."""
    by_norm: bool = True
    """Weigh clients by the norm of their products; false: as `weighting` says, which is zero-padded FedAvg."""
    cap: float | None = Field(None, ge=1)
    """No norm counts for more than so many times the median, against a client that scales its factors up."""

    def rank(self, state: State, client: Member) -> int:
        """What is left of the client's rank."""
        return int(state.numbers.get("ranks", {}).get(client.id, super().rank(state, client)))

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Train with a penalty on the tail, and cut the tail off where it became smaller."""
        start, rank = received.params, largest_rank(received.params)
        kept = max(min(self.least, rank), floor(self.gamma * rank + 1e-9))
        mask = (torch.arange(rank) >= kept).float()
        penalty = self.pull if self.gamma < 1 and self.decay else None
        report = await client.fit(start, self.train, penalty, cut={"mask": mask})
        params = report.params
        if kept < rank and bool(tail(params, mask) < tail(start, mask)):  # a start from B = 0 has no tail to lose
            params, rank = rank_view(params, kept).extract(params), kept
        numbers = Scalars({"rank": float(rank)})
        return Upload(factors(params), weight=client.size, metrics=report.metrics, rank=numbers)

    def pull(self, params: Tensors, start: Tensors, cut: Tensors) -> torch.Tensor:
        """lambda times the tail's norms."""
        return self.decay * tail(params, cut["mask"])

    @property
    def reducer(self) -> Reducers:
        """A sum with weights by norm, and every client's rank."""
        return {"update": NormMean(self.weighting, self.by_norm, self.cap), "rank": Collect()}

    def expected(self, state: State) -> dict[str, Tensors]:
        """Entries of the global pair, and one number."""
        return {"update": state.params, "rank": {"rank": torch.zeros(())}}

    def finalize(self, state: State, update: Update) -> State:
        """The weighted sum where somebody owns an entry; a rank only goes down."""
        found, ranks = update.parts["update"], dict(state.numbers.get("ranks", {}))
        params = {name: tensor.clone() for name, tensor in state.params.items()}
        trees = (found.sums, found.weights) if isinstance(found, OwnedSum) else ({}, {})
        for name, total in trees[0].items():
            here = tuple(slice(0, size) for size in total.shape)
            params[name][here] = torch.where(trees[1][name] > 0, total.float(), params[name][here])
        largest = largest_rank(state.params)
        for client, part in update.collected["rank"].items():
            claimed = int(part.values["rank"]) if isinstance(part, Scalars) else largest
            ranks[client] = min(ranks.get(client, largest), max(claimed, 1))
        return replace(state.with_(params), numbers={**state.numbers, "ranks": ranks})


def tail(params: Tensors, mask: torch.Tensor) -> torch.Tensor:
    """The sum over layers of |B[:, c:r]| |A[c:r]| (Frobenius), with mask 1 from c on; differentiable, 0 at 0."""
    norm = torch.linalg.vector_norm
    found = [
        norm(params[name.removesuffix(A) + B] * mask) * norm(tensor * mask.unsqueeze(1))
        for name, tensor in params.items()
        if name.endswith(A)
    ]
    return torch.stack(found).sum()
