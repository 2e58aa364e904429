"""Local - every client trains alone and nothing is shared: what a client has without the federation.

The trained tensors stay in the client's private store and are measured there. Work and budget are those of the method
it is compared with; only a loss travels.
"""

from fedllm.core.card import Card
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.work import Client


class Local(Method):
    """Training without a federation."""

    card = Card(
        title="Local - each client alone",
        paper="baseline",
        cells=("2.5 Frameworks",),
        travels="down: nothing; up: nothing but the training loss",
        claim="The score a federation must beat.",
        status="runs",
    )
    private = ("params",)
    mixes = ("models",)

    def distribute(self, state: State, client: Member) -> Received:
        """Nothing: a client begins at its own first values."""
        return Received()

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Train on from one's own weights and keep them."""
        report = await client.fit(client.private.get("params") or client.initial(), self.train)
        client.private["params"] = report.params
        return Upload(None, weight=client.size, metrics=report.metrics)

    @property
    def reducer(self) -> Reducers:
        """Nothing to reduce."""
        return {}

    def finalize(self, state: State, update: Update) -> State:
        """The state stays as it was."""
        return state

    def weights(self, state: State, start: Tensors) -> Tensors:
        """None: the clients share no model."""
        return {}

    @on_client
    async def evaluate(self, client: Client, received: Received) -> Upload:
        """Measure the client's own weights."""
        report = await client.score(client.private.get("params") or client.initial())
        return Upload(None, weight=client.size, metrics=report.metrics)
