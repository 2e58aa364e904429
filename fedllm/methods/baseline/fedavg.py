"""FedAvg - clients train from the global weights; the server takes the weighted mean of their changes.

It is what every slot of Method does by default; everything else in this library is "FedAvg plus one idea".

Deviations from the paper: the local optimiser is AdamW with gradient clipping by default (the paper's is plain SGD:
train.optimizer=sgd train.clip_norm=null), and a round may count optimiser steps instead of epochs.
"""

from fedllm.core.card import Card
from fedllm.core.method import Method


class FedAvg(Method):
    """Federated averaging."""

    card = Card(
        title="FedAvg - average the clients' local training",
        paper="McMahan et al., AISTATS 2017, arXiv:1602.05629",
        cells=("2.4 Decentralized Training", "2.5 Frameworks"),
        travels="down: trainable tensors; up: their change and the number of examples",
        claim="Reaches a lower held-out loss than any client alone, with far fewer rounds than one-step averaging.",
        status="verified",
    )
