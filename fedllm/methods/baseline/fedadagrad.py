"""FedAdagrad - the server divides by the root of the sum of all squared changes so far.

Deviations from the paper: none in the default convention; `convention` reproduces those of published code.
"""

import torch

from fedllm.blocks.adaptive_server import AdaptiveServer
from fedllm.core.card import Card


class FedAdagrad(AdaptiveServer):
    """Adagrad at the server."""

    card = Card(
        title="FedAdagrad - Adagrad at the server",
        paper="Reddi et al., ICLR 2021, arXiv:2003.00295",
        cells=("2.4 Decentralized Training", "2.5 Frameworks"),
        travels="as FedAvg",
        claim="Adaptive server steps help where gradients are sparse or clients differ.",
        status="verified",
    )

    def idle(self) -> dict[str, str]:
        """Adagrad forgets nothing and has no momentum."""
        why = "Adagrad adds up all squares and has no momentum; fedadam and fedyogi have both decays"
        return {"beta1": why, "beta2": why}

    def first_decay(self) -> float:
        """b1 = 0: m is the change itself."""
        return 0.0

    def second(self, v: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """v + d^2."""
        return v + d.square()

    def second_of_momentum(self) -> bool:
        """m is d here."""
        return False
