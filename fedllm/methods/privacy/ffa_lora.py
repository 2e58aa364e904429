"""FFA-LoRA - one random A, frozen everywhere; only B is trained and shared.

Averaging A and B apart is not averaging B A, and noise added to both multiplies. With a common A the mean of the B is
exactly the mean of the weight changes, noise on B stays linear in what is published, and half as much travels. So it
is the natural host for secure sums, encryption and differential privacy. It has less capacity at the same rank.

Deviations: A is the adapter's ordinary start, which every side derives from the run's seed; it never travels, and a
client whose A has other bits refuses to work. Orthonormal rows, the paper's other start, are left out. The head of a
classifier is trained and shared unless `head=false` (the paper freezes it). Plain SGD is not forced.
"""

from __future__ import annotations

import torch

from fedllm.blocks.lora import A, B, digest, pairs
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Update
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.tensors import Tensors, add
from fedllm.core.work import Client

LEAST = 1e-4
"""The smallest singular value of A, as a share of the largest, with which B can still learn."""


class FFALoRA(Method):
    """Federated averaging of B under a frozen common A."""

    card = Card(
        title="FFA-LoRA - freeze the random A, train and share B alone",
        paper="Sun et al., ICLR 2024, arXiv:2403.12313",
        cells=("2.2 Privacy", "2.3 Parameter Efficiency"),
        travels="down and up: B of every layer, o r numbers, and a trained head; A never",
        claim="The average is exactly that of the weight changes, noise stays linear, and half as much is uploaded.",
        status="verified",
    )
    adapters = ("lora",)

    head: bool = True
    """Train and share what is not LoRA (a classifier's head); false leaves it at its random start, as in the paper."""

    def trainable(self, name: str) -> bool:
        """LoRA and the head. A is among them so that both sides see theirs and can compare; it never moves."""
        return self.head or name.endswith((A, B))

    def init(self, start: Tensors) -> State:
        """A, which stays, and B = 0, after a look at whether B can learn; A is in the state for whoever saves it."""
        found = pairs(start)
        if not found:
            raise ConfigError("FFA-LoRA found no LoRA factor to train.", action="Set adapter.kind=lora.")
        for name, pair in found.items():
            if bool((pair.b != 0).any()):
                raise ConfigError(
                    f"'{name}{B}' does not begin at zero.",
                    "FFA-LoRA needs the ordinary start: A random, B = 0.",
                    action="Starts that change the base (PiSSA and the like) do not fit a frozen A.",
                )
            values = torch.linalg.svdvals(pair.a.float())
            if float(values[-1]) <= LEAST * float(values[0]):
                raise ConfigError(
                    f"'{name}{A}' has singular values from {float(values[-1]):.1e} to {float(values[0]):.1e}.",
                    "A never moves, so B could learn nothing in some directions.",
                    action="Give it another start or a smaller rank.",
                )
        return State(start, numbers={"a": digest({name: pair.a for name, pair in found.items()})})

    def distribute(self, state: State, client: Member) -> Received:
        """B, and a fingerprint of A."""
        return Received(_moving(state.params), {"a": state.numbers["a"]})

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Train B; the model runs with the client's own A, which is everybody's."""
        _same_a(client, received)
        return await super().work(client, received)

    def expected(self, state: State) -> dict[str, Tensors]:
        """B and the head."""
        return {"update": _moving(state.params)}

    def finalize(self, state: State, update: Update) -> State:
        """B <- B + mean(delta B)."""
        return state.with_({**state.params, **add(_moving(state.params), update.params)})

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """Measured with the client's own A."""
        _same_a(client, received)
        return await super().evaluate(client, received)


def _moving(tensors: Tensors) -> Tensors:
    """Everything but A."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(A)}


def _same_a(client: Client, received: Received) -> None:
    """Raise :class:`ConfigError` where the client's A is not the server's."""
    own = digest({name: pair.a for name, pair in pairs(client.initial()).items()})
    if own != received.numbers.get("a"):
        raise ConfigError(
            f"The frozen A of client '{client.id}' is not the server's ({own}, not {received.numbers.get('a')}).",
            "B has a meaning only beside one common A.",
            action="Give both the same seed, adapter, model and version of torch.",
        )
