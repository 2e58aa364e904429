"""FedPrompt - clients tune one soft prompt of a frozen language model together; only the prompt travels.

A language model is large and its prompt tiny: m vectors of the model's width, put before the embedded text. Clients
get the model once, train the prompt alone (adapter.kind=prompt) and send its change: 4 m d bytes in either direction.
The answer is read off the language model itself (task.kind=causal-lm with the label's text as the response), so that
no new, random head has to be trained.

Deviations: encoder-decoders are left out; the reparameterisation is a two-layer network with a skip connection, not an
LSTM. The paper's local differential privacy is a mode that goes around any method. Its backdoor study is
fedllm/evaluate/backdoor.py, which works with any method as well.
"""

from __future__ import annotations

from typing import Any, Literal

from fedllm.core.card import Card
from fedllm.core.method import Method
from fedllm.core.train import Train

PROMPT = "prompt"
"""The soft prompt is a tensor of this name; the tensors of its encoder begin with it."""


class FedPrompt(Method):
    """Federated averaging of a soft prompt."""

    card = Card(
        title="FedPrompt - federate a soft prompt of a frozen language model",
        paper="Zhao et al., ICASSP 2023, arXiv:2208.12268",
        cells=("3.7 Communication-efficient prompts", "Table 3 Communication Efficient"),
        travels="down: the prompt, m x d numbers; up: its change and the number of examples",
        claim="Sends about 0.01 % of the model and loses little accuracy, on alike and on different clients.",
        models=("causal-lm", "masked-lm", "sequence-classification", "token-classification"),
        status="runs",
    )
    adapters = ("prompt",)

    train: Train = Train(lr=3e-2)  # pyright: ignore[reportCallIssue]
    """Local training; prompts need a rate 10 to 100 times that of weights."""
    encoder: Literal["none", "mlp"] = "none"
    """Reparameterise the prompt by a small network; its weights travel too, and count."""
    head: bool = True
    """Train a classification head, where the task has one: it travels and counts, and is no part of the paper."""

    def adapter(self) -> dict[str, Any]:
        """The prompt's encoder."""
        return {} if self.encoder == "none" else {"encoder": self.encoder}

    def trainable(self, name: str) -> bool:
        """The prompt (with its encoder), and a head where asked for."""
        return self.head or name.partition(".")[0] == PROMPT
