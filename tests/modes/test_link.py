"""The line between server and clients: what is damaged, swapped or lost on it is refused, and the round goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm.core.guard import Guard
from fedllm.core.server import Reply
from fedllm.effects.rig import Play
from fedllm.methods import find
from fedllm.modes.link import Link
from fedllm.tasks.function import FunctionLearner


def play(up: Any = None, down: Any = None, guard: Guard | None = None, public: Any = None) -> Play:
    learner = FunctionLearner(
        lambda params, examples: sum(((params["w"] - x) ** 2).sum() / 2 for x in examples), {"w": torch.zeros(3)}
    )
    rows = {f"c{k}": [{"x": [0.1 * k, 0.2, -0.1 * k]}] for k in range(4)}
    train = {"steps": 1, "batch_size": 1, "lr": 0.1, "optimizer": "sgd", "clip_norm": None}
    found = Play(find("fedavg")(train=train), learner, rows, guard=guard)
    ways = {name: way for name, way in (("up", up), ("down", down)) if way is not None}
    found.server.engine = Link(found.server.engine, **ways)
    return found


def flipped(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]


def test_a_link_that_only_listens_changes_nothing() -> None:
    sizes: list[int] = []
    plain, heard = play(), play(up=lambda reply: sizes.append(len(reply.body)) or reply)
    for each in (plain, heard):
        each.rounds(2)
    assert torch.equal(plain.state.params["w"], heard.state.params["w"]) and len(sizes) == 8
    assert sum(sizes) == heard.server.meter.total("up", "work")


@pytest.mark.parametrize("at", [0, 9, 40])
def test_a_damaged_reply_is_refused_and_the_round_goes_on(at: int) -> None:
    def damaged(reply: Reply) -> Reply:
        return reply if reply.client != "c1" else replace(reply, body=flipped(reply.body or b"", at))

    found = play(up=damaged)
    found.rounds(1)
    record = found.records[0]
    assert record.failed is None and record.used == 3 and record.rejected[0]["client"] == "c1"


def test_a_lost_reply_is_a_lost_client() -> None:
    found = play(up=lambda reply: None if reply.client == "c2" else reply)
    found.rounds(1)
    assert found.records[0].lost == [{"client": "c2", "reason": "lost on the way"}] and found.records[0].used == 3


def test_a_damaged_request_is_answered_with_an_error() -> None:
    found = play(down=lambda request: replace(request, body=request.body[:-3]) if request.client == "c0" else request)
    found.rounds(1)
    assert found.records[0].used == 3 and found.records[0].lost[0]["client"] == "c0"


def test_public_rows_pass_the_guard_too() -> None:
    """Rows that anybody may read are where an attacker may write."""
    seen: list[str] = []

    class Watching(Guard):
        def rows(self, client: str, split: str, rows: Any) -> Any:
            seen.append(split)
            return rows

    found = play(guard=Watching())
    found.rounds(1)
    found.worker.read("c0", "public")
    assert set(seen) == {"train", "public"}
