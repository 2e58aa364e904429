"""Server - asks, meters, and lets nothing through that is not a finite upload."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError
from fedllm.core.message import Dense, Message, Received, Scalars, Table, Upload
from fedllm.core.method import on_client
from fedllm.core.server import Answer, Reply, Request, Server
from fedllm.core.state import State
from fedllm.core.wire import decode, encode


@on_client
async def probe(self: Any, client: Any, received: Received) -> Upload:
    """Asked for by its name alone."""
    return Upload()


class Scripted:
    """An engine that answers with given bytes."""

    def __init__(self, bodies: dict[str, bytes | None]) -> None:
        self.bodies, self.requests, self.settled = bodies, [], []
        self.dropped: list[str] = []
        self.given: float | None = None

    @property
    def client_ids(self) -> Sequence[str]:
        return sorted(self.bodies)

    async def ask(self, requests: Iterable[Request], deadline: float | None) -> AsyncIterator[Reply]:
        self.given = deadline
        for request in requests:
            self.requests.append(request)
            body = self.bodies[request.client]
            error = None if body is not None else f"{request.client} is gone"
            yield Reply(request.id, request.client, body, error, {"tokens": 5, "steps": 2})

    def drop(self, client: str) -> None:
        self.dropped.append(client)

    def settle(self, accepted: Sequence[str]) -> None:
        self.settled.append(list(accepted))


def ask(server: Server, clients: Iterable[str] | None = None, **options: Any) -> list[Answer]:
    async def go() -> list[Answer]:
        payloads = {c: Received({"w": torch.ones(2)}) for c in clients or server.clients}
        return [answer async for answer in server.ask(probe, payloads, **options)]

    return asyncio.run(go())


def good(value: float = 1.0) -> bytes:
    return encode(Upload({"w": torch.full((2,), value)}, 3.0, {"loss": (1.0, 2.0)}))


def test_accepted_answers_come_with_their_client() -> None:
    engine = Scripted({"a": good(1), "b": good(2)})
    server = Server(engine, 0, rounds=4, round=3)
    answers = ask(server, deadline=9.0)
    assert [(a.client, a.upload.update["w"][0].item()) for a in answers] == [("a", 1.0), ("b", 2.0)]
    first = engine.requests[0]
    assert (first.client, first.op, first.round, first.rounds, first.population) == ("a", "probe", 3, 4, 2)
    assert engine.given == 9.0
    assert isinstance(decode(first.body), Received)
    assert (server.meter.tokens, server.meter.steps) == (10, 4)


def test_request_ids_never_repeat() -> None:
    engine = Scripted({"a": good(), "b": good()})
    server = Server(engine, 0)
    for _ in range(3):
        ask(server)
    assert len({request.id for request in engine.requests}) == 6


def test_payloads_are_made_only_when_they_are_sent() -> None:
    made: list[str] = []

    def pairs() -> Iterable[tuple[str, Received]]:
        for client in ("a", "b", "c"):
            made.append(client)
            yield client, Received()

    async def go() -> None:
        async for _ in server.ask(probe, pairs()):
            seen.append(list(made))

    server, seen = Server(Scripted({c: good() for c in "abc"}), 0), []
    asyncio.run(go())
    assert seen == [["a"], ["a", "b"], ["a", "b", "c"]]


def test_a_function_without_the_mark_is_refused_before_anything_is_sent() -> None:
    async def other(self: Any, client: Any, received: Received) -> Upload:
        return Upload()

    async def go() -> None:
        async for _ in server.ask(other, {"a": Received()}):
            pass

    engine = Scripted({"a": good()})
    server = Server(engine, 0)
    with pytest.raises(ConfigError, match=r"'other' is not a client-side function.*@on_client"):
        asyncio.run(go())
    assert not engine.requests


NAN, INF = float("nan"), float("inf")


def with_numbers(text: bytes) -> bytes:
    """An upload whose numbers hold the JSON `text`."""
    facts = {"version": 1, "class": "upload", "parts": {}, "numbers": {"a": 12345}, "weight": 1, "metrics": {}}
    header = json.dumps({"__metadata__": {"fedllm": json.dumps(facts)}}).encode().replace(b"12345", text)
    return struct.pack("<Q", len(header)) + header


BAD: dict[str, bytes] = {
    "NaN in a tensor": encode(Upload({"w": torch.tensor([1.0, NAN])})),
    "infinity in a tensor": encode(Upload({"w": torch.tensor([1.0, -INF])})),
    "NaN in half precision": encode(Upload({"w": torch.tensor([NAN]).bfloat16()})),
    "NaN in a later part": encode(Upload({"w": torch.ones(1)}, other={"v": torch.tensor([NAN])})),
    "NaN in a table": encode(Upload(t=Table(torch.ones(1, 1), torch.tensor([NAN])))),
    "NaN in a scalar": encode(Upload(s=Scalars({"a": NAN}))),
    "infinity in a metric": encode(Upload(None, 1.0, {"loss": (INF, 1.0)})),
    "NaN in the numbers": encode(Upload(None, 1.0, None, {"deep": [{"x": NAN}]})),
    "NaN as weight": encode(Upload(None, NAN)),
    "negative weight": encode(Upload(None, -1.0)),
    "a received": encode(Received({"w": torch.ones(1)})),
    "a message": encode(Message({"update": Dense({"w": torch.ones(1)})})),
    "no message": b"hello world, hello world",
    "no bytes": b"",
    "infinity as text": with_numbers(b"1e999"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_finite_upload_is_rejected_and_the_others_go_on(name: str) -> None:
    server = Server(Scripted({"a": good(), "bad": BAD[name], "c": good()}), 0)
    assert [answer.client for answer in ask(server)] == ["a", "c"]
    assert [entry["client"] for entry in server.rejected] == ["bad"]
    assert server.rejected[0]["reason"]
    assert server.lost == []
    server.settle()
    assert server.engine.settled == [["a", "c"]]  # type: ignore[attr-defined]


def test_facts_nested_almost_too_deeply_do_not_break_the_server() -> None:
    """There is a depth that can be read but not written again: the check must not die of it."""
    for depth in range(700, 1000):
        server = Server(Scripted({"a": good(), "bad": with_numbers(b"[" * depth + b"]" * depth)}), 0)
        assert "a" in [answer.client for answer in ask(server)]


def test_all_bytes_are_counted_even_those_that_were_no_message() -> None:
    bodies = {"a": good(), "bad": b"x" * 33, "nan": BAD["NaN in a tensor"]}
    engine = Scripted(bodies)
    server = Server(engine, 0)
    ask(server)
    assert server.meter.total("up") == sum(len(body) for body in bodies.values())
    assert server.meter.total("down") == sum(len(request.body) for request in engine.requests)
    assert server.meter.bytes["probe/up/undecodable"] == 33
    assert server.meter.messages == {"probe/down": 3, "probe/up": 3}


def test_lost_clients_are_recorded_with_their_reason() -> None:
    server = Server(Scripted({"a": None, "b": good()}), 0)
    assert [answer.client for answer in ask(server)] == ["b"]
    assert server.lost == [{"client": "a", "reason": "a is gone"}]


def test_settle_keeps_the_accepted_and_begin_clears_the_lists() -> None:
    engine = Scripted({"a": good(), "b": good(), "c": None})
    server = Server(engine, 0)
    ask(server)
    server.reject("b", "wrong shape")
    assert server.rejected == [{"client": "b", "reason": "wrong shape"}]
    server.settle()
    assert engine.settled == [["a"]]
    assert [entry["client"] for entry in server.lost] == ["c"], "what happened can be read until the next round"
    server.begin(2)
    assert (server.lost, server.rejected) == ([], [])
    ask(server)
    server.settle(commit=False)
    assert engine.settled[-1] == []
    server.settle()
    assert engine.settled[-1] == [], "what was settled is not settled again"


def test_a_checkpoint_settles_and_keeps_the_state() -> None:
    kept: list[State] = []
    engine = Scripted({"a": good()})
    server = Server(engine, 0, keep=kept.append)
    ask(server)
    state = State({})
    server.checkpoint(state)
    assert engine.settled == [["a"]]
    assert kept == [state]
    server.settle()
    assert engine.settled[-1] == []


def test_enough() -> None:
    engine = Scripted({c: good() for c in "abcd"})
    assert [answer.client for answer in ask(Server(engine, 0), enough=2)] == ["a", "b"]
    assert len(engine.requests) == 2


def test_enough_counts_what_was_accepted() -> None:
    engine = Scripted({"a": BAD["NaN in a tensor"], "b": good(), "c": good(), "d": good()})
    assert [answer.client for answer in ask(Server(engine, 0), enough=2)] == ["b", "c"]
