"""Photon - the outer step, one stream and one schedule over all rounds, what a silo keeps."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
import torch

from fedllm.core.errors import FedLLMError
from fedllm.core.message import Dense
from fedllm.core.reducer import Update
from fedllm.core.server import Server
from fedllm.core.state import State
from fedllm.core.train import Schedule, Train
from fedllm.core.wire import decode, encode
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.rounds import play_round
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.directions.photon import PRESETS, Photon
from fedllm.tasks.function import FunctionLearner
from tests.methods.conftest import Held

SGD = Train(steps=3, lr=0.05, optimizer="sgd", clip_norm=None, batch_size=3)
ONE = Train(steps=1, lr=0.05, optimizer="sgd", clip_norm=None, batch_size=64)
PLAIN: dict[str, Any] = {"server_lr": 1.0, "momentum": 0.0, "keep_optimizer": False}


def update(change: float) -> Update:
    return Update({"update": Dense({"w": torch.tensor([change])})}, clients=1)


def test_the_outer_step_is_nesterov_in_the_published_order() -> None:
    """d = -change; v <- mu v + d; g <- g - eta (d + mu v), by hand over three rounds."""
    method = Photon(server_lr=0.7, momentum=0.9)
    state = method.init({"w": torch.tensor([1.0])})
    g, v = 1.0, 0.0
    for change in (0.5, -0.2, 0.1):
        state = method.finalize(state, update(change))
        d = -change
        v = 0.9 * v + d
        g = g - 0.7 * (d + 0.9 * v)
        assert float(state.params["w"]) == pytest.approx(g, abs=1e-6)
        assert float(state.memory["velocity"]["w"]) == pytest.approx(v, abs=1e-6)


def test_without_momentum_and_with_rate_one_it_is_the_weighted_mean() -> None:
    state = Photon(**PLAIN).init({"w": torch.tensor([1.0])})
    assert state.memory == {}
    assert float(Photon(**PLAIN).finalize(state, update(0.25)).params["w"]) == 1.25


def test_one_inner_step_is_one_synchronous_step(play: Any, net: Any, people: Any) -> None:
    """H = 1, plain SGD, equally large silos: the mean of their steps is a step on the mean gradient."""
    equal = {client: rows[:4] for client, rows in people.items() if len(rows) >= 4}
    found = play(Photon(train=ONE, **PLAIN), equal, 1, **net)
    pooled = play(FedAvg(train=ONE), {"all": [row for rows in equal.values() for row in rows]}, 1, **net)
    for name, tensor in found.state.params.items():
        assert torch.allclose(tensor, pooled.state.params[name], atol=1e-6), name


def test_a_silos_stream_goes_on_and_is_not_begun_anew(play: Any, net: Any, people: Any) -> None:
    """Two rounds of three steps by one silo are six steps of one run, also with the optimiser's memory."""
    one = {"q": people["q"]}
    adam = Train(steps=3, lr=0.01, clip_norm=None, batch_size=2)
    for train in (SGD, adam):
        options = {**PLAIN, "keep_optimizer": True}
        twice = play(Photon(train=train, **options), one, 2, **net)
        long = play(Photon(train=train.model_copy(update={"steps": 6}), **options), one, 1, **net)
        for name, tensor in long.state.params.items():
            assert torch.allclose(tensor, twice.state.params[name], atol=1e-6), name
        assert twice.private("q")["begun"] == 6
    fresh = play(Photon(train=adam, **PLAIN), one, 2, **net)
    assert not all(torch.allclose(t, twice.state.params[n], atol=1e-6) for n, t in fresh.state.params.items())
    assert "moments" not in fresh.private("q")


def test_one_schedule_runs_over_all_rounds() -> None:
    train = Train(steps=4, lr=1.0, schedule=Schedule(kind="cosine", by="step", warmup=0.25, final=0.1))
    rates = [train.rate(round, 4, step, 4) for round in (1, 2, 3, 4) for step in range(4)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] > 0.1


def test_presets_and_what_stands_in_their_place() -> None:
    assert Photon().outer() == (0.7, 0.7, False) and Photon(preset="diloco").outer() == (0.7, 0.9, False)
    assert Photon(preset="photon-fedavg").outer() == PRESETS["photon-fedavg"]
    assert Photon(preset="diloco", momentum=0.5, keep_optimizer=True).outer() == (0.7, 0.5, True)


def test_silos_count_by_their_tokens(play: Any, net: Any, people: Any) -> None:
    """Equal steps of batches of 3 over p (5 rows), q (12) and s (8): a short last batch of a pass has fewer tokens."""
    some = {client: people[client] for client in ("p", "q", "s")}
    found, tokens = play(Photon(train=SGD, **PLAIN), some, 1, **net), {"p": 3 + 2 + 3, "q": 9, "s": 3 + 3 + 2}
    alone = {c: play(Photon(train=SGD, **PLAIN), {c: rows}, 1, **net).state.params for c, rows in some.items()}
    assert found.records[0].tokens == sum(tokens.values())
    for name, tensor in found.state.params.items():
        mean = sum(tokens[c] * params[name] for c, params in alone.items()) / sum(tokens.values())
        assert torch.allclose(tensor, mean, atol=1e-6), name


def test_traffic_falls_by_the_number_of_inner_steps(play: Any, net: Any, people: Any) -> None:
    """As many inner steps in H times fewer rounds: H times fewer bytes of weights, both ways, by the meter."""
    every = play(Photon(train=SGD.model_copy(update={"steps": 1})), people, 6, **net).server.meter
    seldom = play(Photon(train=SGD.model_copy(update={"steps": 6})), people, 1, **net).server.meter
    assert every.steps == seldom.steps == 6 * len(people)
    for part in ("work/up/update", "work/down/params"):
        assert every.bytes[part] == 6 * seldom.bytes[part]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_four_rounds_are_two_and_two_after_a_restart(
    preset: Any, net: Any, people: Any, same: Any, tmp_path: Any
) -> None:
    """Weights, momentum, the silos' moments and the places in their streams, bit for bit."""
    schedule = Schedule(kind="cosine", by="step", warmup=0.1, final=0.1)
    method = Photon(preset=preset, train=Train(steps=3, lr=0.01, batch_size=2, schedule=schedule))
    learner = FunctionLearner(net["loss"], net["start"])

    def rounds(count: int, folder: Any, state: State | None, kept: dict[str, str]) -> tuple[State, LocalWorker]:
        worker = LocalWorker(learner, method, Held(people), 0, folder)
        worker.private.restore(kept)
        server = Server(LocalEngine(worker, sorted(people), 8), 0, rounds=4)

        async def go() -> State:
            now = state or method.init(learner.initial())
            for _ in range(count):
                now, record = await play_round(method, now, server, len(people))
                assert record.failed is None
            return now

        return asyncio.run(go()), worker

    whole, first = rounds(4, tmp_path / "a", None, {})
    half, before = rounds(2, tmp_path / "b", None, {})
    saved = State.from_message(decode(encode(half.to_message())))
    again, after = rounds(2, tmp_path / "b", saved, before.private.manifest())
    assert same(whole, again) and first.private.manifest() == after.private.manifest() != {}


@pytest.mark.parametrize("wrong", [{"server_lr": 0.0}, {"momentum": 1.0}, {"preset": "photon"}])
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((FedLLMError, ValueError)):
        Photon(**wrong)
    with pytest.raises((FedLLMError, ValueError)):
        Photon(train={"steps": 0})


def test_without_an_answer_weights_momentum_and_streams_stay(net: Any, people: Any, same: Any) -> None:
    learner, method = FunctionLearner(net["loss"], net["start"]), Photon(train=SGD)
    worker = LocalWorker(learner, method, Held(people), 0)
    server = Server(Gone(LocalEngine(worker, sorted(people), 8)), 0, rounds=3)  # pyright: ignore[reportArgumentType]

    async def go() -> list[State]:
        states = [method.init(learner.initial())]
        for number in (1, 2, 3):
            server.engine.gone = number == 2  # type: ignore[attr-defined]
            state, record = await play_round(method, states[-1], server, len(people))
            assert bool(record.failed) == (number == 2)
            states.append(state)
        return states

    states = asyncio.run(go())
    assert same(states[1], states[2]) and not same(states[2], states[3])
    assert dict(worker.private.open("q"))["begun"] == 6, "two rounds of three steps"


def test_momentum_carries_a_round_without_change() -> None:
    state = State({"w": torch.zeros(1)}, {"velocity": {"w": torch.ones(1)}})
    moved = Photon(server_lr=1.0, momentum=0.5).finalize(state, update(0.0))
    assert float(moved.memory["velocity"]["w"]) == 0.5 and float(moved.params["w"]) == -0.25


class Gone:
    """An engine whose answers do not arrive while `gone`."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine, self.gone = engine, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def ask(self, requests: Any, deadline: float | None) -> Any:
        async for reply in self.engine.ask(requests, deadline):
            if self.gone:
                self.engine.drop(reply.client)
            yield dataclasses.replace(reply, body=None, error="unplugged") if self.gone else reply
