"""FedAdam - Adam at the server, over the mean changes of the rounds.

Deviations from the paper: none in the default convention. The paper has no bias correction; `convention: flower`
applies Flower's.
"""

import torch

from fedllm.blocks.adaptive_server import AdaptiveServer
from fedllm.core.card import Card


class FedAdam(AdaptiveServer):
    """Adam at the server."""

    card = Card(
        title="FedAdam - Adam at the server",
        paper="Reddi et al., ICLR 2021, arXiv:2003.00295",
        cells=("2.4 Decentralized Training", "2.5 Frameworks"),
        travels="as FedAvg",
        claim="Adaptive server steps help where gradients are sparse or clients differ.",
        status="verified",
    )

    def second(self, v: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """b2 v + (1 - b2) d^2."""
        return self.beta2 * v + (1 - self.beta2) * d.square()

    def rate(self, round: int) -> float:
        """eta, with bias correction in Flower's convention: eta sqrt(1 - b2^(t+1)) / (1 - b1^(t+1))."""
        if self.convention != "flower":
            return self.server_lr
        return self.server_lr * (1 - self.beta2 ** (round + 1)) ** 0.5 / (1 - self.beta1 ** (round + 1))
