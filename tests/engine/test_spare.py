"""Clients to spare: the first answers that make up a cohort count, and a client that fails is made up for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Any

import pytest
import torch

import fedllm
from fedllm.core.errors import ModeConflict
from fedllm.core.message import Upload
from fedllm.core.meter import Meter
from fedllm.core.roster import ALL, Group
from fedllm.core.server import Reply, Request, Server
from fedllm.core.state import State
from fedllm.core.wire import encode
from fedllm.engine.rounds import play_round
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.run import Watch

CLIENTS = [f"c{k}" for k in range(8)]
WEIGHTS = {"w": torch.zeros(2)}


class Clients:
    """An engine whose clients answer at once: some not at all, some with a wrong shape."""

    def __init__(self, silent: Iterable[str] = (), wrong: Iterable[str] = ()) -> None:
        self.client_ids, self.silent, self.wrong = CLIENTS, set(silent), set(wrong)
        self.asked: list[str] = []
        self.settled: list[str] = []

    def group(self, client: str) -> Group:
        return ALL

    async def ask(self, requests: Iterator[Request], deadline: float | None) -> AsyncGenerator[Reply, None]:
        for request in requests:
            self.asked.append(request.client)
            if request.client in self.silent:
                yield Reply(request.id, request.client, None, "silent")
                continue
            values = torch.ones(3 if request.client in self.wrong else 2) * (1 + CLIENTS.index(request.client))
            yield Reply(request.id, request.client, encode(Upload({"w": values})), None)

    def close(self, sessions: Any) -> None:
        """No conversation."""

    def drop(self, client: str) -> None:
        """Nothing is kept."""

    def settle(self, accepted: Any) -> None:
        self.settled += accepted


def played(engine: Clients, spare: int, cohort: int = 3, seed: int = 0) -> Any:
    server = Server(engine, seed, Meter())
    start = State({name: tensor.clone() for name, tensor in WEIGHTS.items()}, {}, {}, 0)
    return asyncio.run(play_round(FedAvg(), start, server, cohort, None, spare))


def test_the_first_that_make_up_a_cohort_count() -> None:
    engine = Clients()
    state, record = played(engine, 2)
    assert len(record.cohort) == 5 and record.used == 3 and len(engine.asked) == 3, "the others were not waited for"
    assert engine.settled == record.cohort[:3] and not record.lost
    mean = sum(1 + CLIENTS.index(client) for client in record.cohort[:3]) / 3
    assert torch.allclose(state.params["w"], torch.full((2,), mean))


def test_who_is_asked_first_is_drawn() -> None:
    firsts = {played(Clients(), 2, seed=seed)[1].cohort[0] for seed in range(40)}
    assert len(firsts) > 5, "an order by name would favour the first names"


@pytest.mark.parametrize("how", ["silent", "wrong"])
def test_clients_that_fail_are_made_up_for(how: str) -> None:
    first = played(Clients(), 2)[1].cohort[:2]
    _, record = played(Clients(**{how: first}), 2)
    assert record.used == 3 and record.failed is None
    assert {entry["client"] for entry in (*record.lost, *record.rejected)} == set(first)
    _, short = played(Clients(silent=record.cohort[:3]), 2)
    assert short.used == 2, "fewer than a cohort are taken where no more come"


def test_without_spare_nothing_changes() -> None:
    engine = Clients()
    _, record = played(engine, 0)
    assert record.cohort == sorted(record.cohort) == engine.asked and record.used == 3


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"privacy": {"noise": 1.0}}, "privacy"),
        ({"secure": {}}, "secure"),
        ({"encrypted": {}}, "encrypted"),
        ({"attack": {"name": "sign-flip"}}, "attack"),
        ({"method": "decentralized-gossip"}, "protocol"),
    ],
)
def test_what_it_cannot_go_with_is_refused_before_training(section: dict[str, Any], word: str) -> None:
    rows = [{"instruction": f"say {i}", "response": str(i)} for i in range(8)]
    recipe = {"model": {"name": "toy:llama"}, "cohort": 2, "spare": 1, "rounds": 1, **section}
    with pytest.raises(ModeConflict, match=word):
        fedllm.run(recipe, data={name: {"train": rows} for name in "abc"})


def test_a_whole_run_with_spare_clients() -> None:
    rows = [{"instruction": f"say {i}", "response": str(i)} for i in range(8)]
    recipe: dict[str, Any] = {
        "model": {"name": "toy:llama"}, "cohort": 2, "spare": 2, "rounds": 2, "adapter": {"rank": 2},
        "train": {"steps": 1, "batch_size": 2}, "evaluation": {"against": []},
    }  # fmt: skip
    seen: list[Any] = []

    class Seen(Watch):
        def round(self, name: str, record: Any, values: Any) -> None:
            seen.append(record)

    fedllm.run(recipe, data={name: {"train": rows} for name in "abcd"}, watch=Seen())
    assert [(len(r.cohort), r.used) for r in seen] == [(4, 2), (4, 2)]
