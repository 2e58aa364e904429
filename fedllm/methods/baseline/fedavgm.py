"""FedAvgM - the server keeps a momentum over the mean changes of the rounds.

Two published conventions differ by a factor of 1 / (1 - beta) in their steady state: `heavy-ball` (Hsu et al.; as in
Flower) and `mean` (an exponential mean that starts at the first change; as in OpenFedLLM).

Deviations from the paper: none in the default convention.
"""

from typing import Literal

from pydantic import Field

from fedllm.core.card import Card
from fedllm.core.method import Method
from fedllm.core.reducer import Update
from fedllm.core.state import State
from fedllm.core.tensors import add, over


class FedAvgM(Method):
    """Federated averaging with server momentum."""

    card = Card(
        title="FedAvgM - server momentum",
        paper="Hsu, Qi, Brown, 2019, arXiv:1909.06335",
        cells=("2.4 Decentralized Training", "2.5 Frameworks"),
        travels="as FedAvg",
        claim="Needs fewer rounds than FedAvg where cohorts are small and clients differ.",
        status="verified",
    )

    beta: float = Field(0.9, ge=0, lt=1)
    """Momentum; 0 is FedAvg."""
    server_lr: float = Field(1.0, gt=0)
    """Server step size."""
    convention: Literal["heavy-ball", "mean"] = "heavy-ball"
    """m <- beta m + d, or m <- beta m + (1 - beta) d with m = d in the first round."""

    def finalize(self, state: State, update: Update) -> State:
        """x <- x + server_lr * m."""
        momentum, change = state.memory.get("momentum"), update.params
        if momentum is None:
            momentum = change
        else:
            share = 1.0 if self.convention == "heavy-ball" else 1.0 - self.beta
            momentum = over(lambda m, d: self.beta * m + share * d, momentum, change)
        return state.with_(add(state.params, momentum, self.server_lr), momentum=momentum)
