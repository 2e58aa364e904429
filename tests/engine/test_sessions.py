"""Conversations between a client half and the server, and what a round may do before, between and after."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest
import torch

from fedllm.core import registry
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.protocol import Protocol
from fedllm.core.reducer import Collect, Reducers, Update
from fedllm.core.roster import SERVER, Group, Member
from fedllm.core.server import Server
from fedllm.core.state import CollectMore, State
from fedllm.core.work import Client
from fedllm.data.federation import Federation
from fedllm.effects.rig import quadratic
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.rounds import play_round

CARD = Card(title="Probe - for a test", paper="none", cells=("-",), travels="nothing", claim="none")


@pytest.fixture(autouse=True)
def _forget() -> Any:
    before = {kind: dict(found) for kind, found in registry._FOUND.items()}
    yield
    registry._FOUND.update(before)


def ground(algorithm: Any, **options: Any) -> tuple[Server, LocalWorker]:
    learner, rows = quadratic()
    federation = Federation.of({c: {"train": held} for c, held in rows.items()}, public=[{"x": [2.0, 3.0]}])
    worker = LocalWorker(learner, algorithm, federation, 0, **options)
    return Server(LocalEngine(worker, federation.client_ids, 2), 0, rounds=3), worker


def talker() -> Any:
    class Talker(Protocol):
        card = CARD
        private = ("kept",)

        @on_client
        async def talk(self, client: Client, received: Received) -> Upload:
            """Keeps an autograd graph open over an exchange."""
            leaf = torch.tensor([2.0], requires_grad=True)
            square = leaf * leaf
            client.private["kept"] = {"leaf": leaf.detach()}
            answer = await client.exchange(Upload(None, value={"square": square.detach()}))
            square.backward(answer["upstream"]["g"])
            last = await client.exchange(Upload(None, value={"grad": leaf.grad}))
            return Upload(None, numbers={"said": last.numbers["word"], "round": client.round})

    return Talker()


def gather(stream: Any) -> list[Any]:
    async def go() -> list[Any]:
        return [answer async for answer in stream]

    return asyncio.run(go())


def test_a_conversation_keeps_its_graph_and_ends_in_an_upload() -> None:
    protocol = talker()
    server, worker = ground(protocol)
    server.begin(1)
    first = gather(server.ask(protocol.talk, {c: Received() for c in server.clients}))
    assert [float(a.upload["value"]["square"]) for a in first] == [4.0, 4.0] and len(worker._sessions) == 2
    up = {a.session: Received(upstream={"g": torch.tensor([float(k + 1)])}) for k, a in enumerate(first)}
    second = gather(server.reply(up))
    assert [float(a.upload["value"]["grad"]) for a in second] == [4.0, 8.0]  # d(x^2)/dx at 2 times 1 and 2
    server.round = 2
    last = gather(server.reply({a.session: Received(numbers={"word": "bye"}) for a in second}))
    assert [a.session for a in last] == [None, None] and not worker._sessions
    assert [a.upload.numbers for a in last] == [{"said": "bye", "round": 2}] * 2
    assert server.meter.total("up", "talk") > 0 and not server.lost
    server.settle()
    assert worker.private.clients() == ["a", "b"]


def test_a_closed_session_frees_what_the_client_held_and_counts_for_nothing() -> None:
    held: list[Any] = []

    class Holder(Protocol):
        card = CARD
        private = ("kept",)

        @on_client
        async def talk(self, client: Client, received: Received) -> Upload:
            """Holds a tensor."""
            big = torch.zeros(10)
            held.append(weakref.ref(big))
            client.private["kept"] = 1
            await client.exchange(Upload())
            return Upload(None, numbers={"n": big.numel()})

    protocol = Holder()
    server, worker = ground(protocol)
    answers = gather(server.ask(protocol.talk, {c: Received() for c in server.clients}))
    server.close([answers[0].session])
    gc.collect()
    assert [ref() is None for ref in held] == [True, False]
    with pytest.raises(ConfigError, match="no open session"):
        gather(server.reply({answers[0].session: Received()}))
    gather(server.reply({answers[1].session: Received()}))
    server.settle()
    assert worker.private.clients() == ["b"]


def test_a_client_that_fails_or_is_late_in_a_session_is_lost_and_the_others_go_on() -> None:
    protocol = talker()
    server, worker = ground(protocol)
    answers = gather(server.ask(protocol.talk, {c: Received() for c in server.clients}))
    up = {answers[0].session: Received(), answers[1].session: Received(upstream={"g": torch.ones(1)})}
    second = gather(server.reply(up))  # the first finds no part 'upstream'
    assert [a.client for a in second] == ["b"] and [entry["client"] for entry in server.lost] == ["a"]
    assert len(worker._sessions) == 1
    late = gather(server.reply({second[0].session: Received(numbers={"word": "x"})}, deadline=-1.0))
    assert late == [] and [entry["client"] for entry in server.lost] == ["a", "b"] and not worker._sessions


def test_a_poisoned_message_ends_its_session() -> None:
    class Poison(Protocol):
        card = CARD

        @on_client
        async def talk(self, client: Client, received: Received) -> Upload:
            """Sends what is not finite."""
            await client.exchange(Upload({"w": torch.tensor([float("nan")])}))
            return Upload()

    protocol = Poison()
    server, worker = ground(protocol)
    assert gather(server.ask(protocol.talk, {"a": Received()})) == []
    assert [entry["client"] for entry in server.rejected] == ["a"] and not worker._sessions


class Phases(Method):
    """Prepares, collects twice, refines at the server."""

    key = "phases-of-a-test"
    card = CARD
    more: int = 1
    """How often more is collected."""

    async def prepare(self, server: Server, state: State) -> State:
        """Ask everybody once."""
        total = 0.0
        async for answer in server.ask(self.first, {c: Received() for c in server.clients}):
            total += answer.upload.weight
        return State(state.params, numbers={"prepared": total})

    @on_client
    async def first(self, client: Client, received: Received) -> Upload:
        """A client's size and its group's rank."""
        return Upload(None, weight=float(client.group.rank or 0))

    def distribute(self, state: State, client: Member) -> Received:
        """The group's rank and what the collection shows."""
        return Received(state.params, {"rank": client.group.rank, "asked": state.numbers.get("asked", 0)})

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """What it saw."""
        draw = float(client.rng("x").random())
        return Upload({"w": torch.tensor([client.turn + 0.0, received.numbers["asked"], draw])}, weight=1.0)

    @property
    def reducer(self) -> Reducers:
        """All uploads, one by one."""
        return Collect()

    def expected(self, state: State) -> dict[str, Any]:
        """Free."""
        return {}

    def finalize(self, state: State, update: Update) -> State | CollectMore:
        """Collect again until there is enough."""
        found = update.collected["update"]
        if len(found) < 2 * (self.more + 1):
            return CollectMore(again=True, numbers={"asked": len(found)})
        seen = {client: part.tensors["w"].tolist() for client, part in found.items()}  # type: ignore[attr-defined]
        return State(state.params, numbers={**state.numbers, "seen": seen})

    async def refine(self, server: Server, state: State) -> State:
        """The server's own rows."""
        async for answer in server.ask(self.public, {SERVER: Received(state.params)}):
            return State(state.params, numbers={**state.numbers, "public": answer.upload.numbers["rows"]})
        return state

    @on_client
    async def public_rows(self, client: Client, received: Received) -> Upload:
        """Not asked."""
        return Upload()

    @on_client
    async def public(self, client: Client, received: Received) -> Upload:  # type: ignore[override]
        """How many rows the server and everybody sees."""
        return Upload(None, numbers={"rows": [client.size, len(client.rows("public"))]})


def test_prepare_collect_again_and_refine() -> None:
    method = Phases(more=2)
    roster = {"a": Group("small", 2), "b": Group("large", 8)}
    server, _ = ground(method, roster=roster)
    state, record = asyncio.run(play_round(method, State({"w": torch.zeros(1)}), server, 2))
    assert record.failed is None and record.used == 6 and state.round == 1 and record.cohort == ["a", "b"]
    assert state.numbers["prepared"] == 10.0 and state.numbers["public"] == [1, 1]
    seen = state.numbers["seen"]
    assert sorted(seen) == ["a", "a@1", "a@2", "b", "b@1", "b@2"]
    assert [seen[c][:2] for c in ("a", "a@1", "a@2")] == [[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]]
    assert len({seen[c][2] for c in seen}) == 6  # every turn has a random stream of its own
    assert "asked" not in state.numbers
    again, _ = asyncio.run(play_round(method, state, server, 2))
    assert again.numbers["prepared"] == 10.0 and again.round == 2


def test_collecting_without_end_is_a_failed_round() -> None:
    method = Phases(more=100)
    server, _ = ground(method)
    before = State({"w": torch.zeros(1)})
    state, record = asyncio.run(play_round(method, before, server, 2))
    assert record.failed == "the method asked for more clients 8 times" and "seen" not in state.numbers


def test_a_client_knows_its_first_values_and_its_group() -> None:
    class Known(Protocol):
        card = CARD

        @on_client
        async def look(self, client: Client, received: Received) -> Upload:
            """Its own start."""
            return Upload(client.initial(), numbers={"group": client.group.name, "turn": client.turn})

    protocol = Known()
    server, _ = ground(protocol, roster={"a": Group("small", 2)}, left=["w"])
    found = gather(server.ask(protocol.look, {c: Received() for c in server.clients}))
    assert [a.upload.numbers["group"] for a in found] == ["small", "all"]
    assert [dict(a.upload.update) for a in found] == [{}, {}]  # the only tensor is left out
    assert server.member("a") == Member("a", Group("small", 2))
