"""Skeleton - the texts of the files that `new-method` writes; `$key`, `$name` and the like are filled in."""

METHOD = '''"""$name - federated averaging with a step size at the server; written by `fedllm new-method`.

Every slot below does what its default does, so the class may keep only those that its idea changes. With server_lr=1
it is FedAvg to the last bit.
"""

from __future__ import annotations

from pydantic import Field

from fedllm.core.card import Card
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.reducer import Mean, Reducers, Update
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.tensors import add
from fedllm.core.work import Client


class $name(Method):
    """Federated averaging with a step size at the server."""

$own_key    card = Card(
        title="$name - federated averaging with a step size at the server",
        paper="not published",
        cells=("$cell",),
        travels="down: trainable tensors; up: their change and the number of examples",
        claim="None of its own: with its defaults it is FedAvg.",
        status="experimental",
    )

    server_lr: float = Field(1.0, gt=0)
    """The mean change of the clients is multiplied by this."""

    def distribute(self, state: State, client: Member) -> Received:
        """Server: what this client receives."""
        return Received(state.params)

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """Client: what it computes and gives back."""
        report = await client.fit(received.params, self.train)
        return Upload(report.delta, weight=client.size, metrics=report.metrics)

    @property
    def reducer(self) -> Reducers:
        """Server: how uploads become one update."""
        return Mean(self.weighting)

    def finalize(self, state: State, update: Update) -> State:
        """Server: how the state changes."""
        return state.with_(add(state.params, update.params, self.server_lr))
'''

TEST = '''"""$key: what must be equal to the bit, and what its options change."""

import torch

from fedllm.effects.rig import Play, quadratic
from fedllm.methods import find
from $module import $name

TRAIN = {"steps": 3, "lr": 0.1, "optimizer": "sgd", "clip_norm": None, "batch_size": 1}


def played(method, rounds=4):
    learner, rows = quadratic()
    return Play(method, learner, rows, rounds=rounds).rounds(rounds).params["w"]


def test_its_defaults_are_fedavg_to_the_bit():
    assert torch.equal(played($name(train=TRAIN)), played(find("fedavg")(train=TRAIN)))


def test_half_a_server_step_moves_half_as_far():
    whole, half = played($name(train=TRAIN), 1), played($name(train=TRAIN, server_lr=0.5), 1)
    assert torch.equal(half, whole / 2)
'''

RECIPE = """name: $key
about: $name on eight organisations, a short run.
rounds: 3
method:
  name: $key
  server_lr: 1.0
train:
  steps: 5
  batch_size: 4
data:
  documents: 16
  held_out: 4
evaluation:
  against: [base]
"""

PAGE = """As a start for a method of your own: federated averaging with a step size at the server. With
`server_lr: 1` it is FedAvg to the last bit.

Try it with `fedllm run $recipe`; its options are listed by `fedllm explain $key`. The rest of its page in the
docs is made from the card, the fields and the module's first lines.
"""
