"""Photon - the outer step, one stream and one schedule over all rounds, what a silo keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.errors import FedLLMError
from fedllm.core.message import Dense
from fedllm.core.reducer import Update
from fedllm.core.state import State
from fedllm.core.train import Schedule, Train
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.directions.photon import PRESETS, Photon

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
    found = play(Photon(train=SGD, **PLAIN), people, 1, **net)
    assert found.records[0].failed is None and found.state.round == 1


@pytest.mark.parametrize("wrong", [{"server_lr": 0.0}, {"momentum": 1.0}, {"preset": "photon"}])
def test_what_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((FedLLMError, ValueError)):
        Photon(**wrong)
    with pytest.raises((FedLLMError, ValueError)):
        Photon(train={"steps": 0})


def test_a_failed_round_leaves_momentum_alone() -> None:
    state = State({"w": torch.zeros(1)}, {"velocity": {"w": torch.ones(1)}})
    moved = Photon(server_lr=1.0, momentum=0.5).finalize(state, update(0.0))
    assert float(moved.memory["velocity"]["w"]) == 0.5 and float(moved.params["w"]) == -0.25
