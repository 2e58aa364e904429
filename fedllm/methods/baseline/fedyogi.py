"""FedYogi - as FedAdam, but the second moment moves by a bounded amount each round.

Deviations from the paper: none in the default convention; `convention` reproduces those of published code.
"""

import torch

from fedllm.blocks.adaptive_server import AdaptiveServer
from fedllm.core.card import Card


class FedYogi(AdaptiveServer):
    """Yogi at the server."""

    card = Card(
        title="FedYogi - Yogi at the server",
        paper="Reddi et al., ICLR 2021, arXiv:2003.00295",
        cells=("2.4 Decentralized Training", "2.5 Frameworks"),
        travels="as FedAvg",
        claim="Adaptive server steps help where gradients are sparse or clients differ.",
        status="verified",
    )

    def second(self, v: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        """v - (1 - b2) d^2 sign(v - d^2)."""
        return v - (1 - self.beta2) * d.square() * torch.sign(v - d.square())
