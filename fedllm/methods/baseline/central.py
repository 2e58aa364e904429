"""Central - all data in one place: what the federation would reach if nothing were private.

Needs everybody's data, so it exists in simulation only. Its one client `everyone` holds all rows; each round it takes
as many optimiser steps as a whole cohort would, on batches of the same size: an equal budget of tokens and steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from fedllm.core.card import Card
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.work import Client

EVERYONE = "everyone"
"""The id of the client that holds all rows."""


class Central(Method):
    """Training on pooled data."""

    card = Card(
        title="Central - all data pooled",
        paper="baseline",
        cells=("2.5 Frameworks",),
        travels="all rows: nothing is private",
        claim="The score a federation can hope for.",
        status="runs",
        simulation_only="it needs every client's rows in one place",
    )

    def cohort(self, round: int, clients: Sequence[str], size: int, rng: numpy.random.Generator) -> list[str]:
        """Everybody's data is one client; `size` is how many clients' budgets it spends."""
        return [EVERYONE]

    def distribute(self, state: State, client: Member) -> Received:
        """The weights, and the budget of a cohort."""
        return Received(state.params, {"budget": state.numbers.get("cohort", 1)})

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """As many steps as a cohort takes."""
        budget = int(received.numbers["budget"])
        steps = self.train.step_count(max(1, client.size // client.population)) * budget
        train = self.train.model_copy(update={"steps": steps, "epochs": None})
        report = await client.fit(received.params, train)
        return Upload(report.delta, weight=client.size, metrics=report.metrics)
