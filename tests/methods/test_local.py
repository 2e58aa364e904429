"""Local - the state never moves, every client goes on from its own weights, and those are what is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.train import Train
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.baseline.local import Local

TRAIN = Train(steps=3, lr=0.05, optimizer="sgd", clip_norm=None, batch_size=64)


def test_the_state_never_changes(play: Any, people: Any, net: Any, same: Any) -> None:
    found = play(Local(train=TRAIN), people, 3, **net)
    assert all(same(found.states[0], state) for state in found.states)
    assert found.state.round == 3
    assert not any(r.failed for r in found.records)
    assert all(r.used == 4 and r.loss is not None for r in found.records)


def test_a_client_goes_on_where_it_stopped(play: Any, people: Any, net: Any) -> None:
    """Three rounds of three steps of full-batch descent are nine steps in one."""
    found = play(Local(train=TRAIN), people, 3, **net)
    for client, rows in people.items():
        x = {n: t.clone() for n, t in net["start"].items()}
        for _ in range(9):
            leaves = {n: t.requires_grad_() for n, t in x.items()}
            (net["loss"](leaves, [torch.tensor(row) for row in rows]) / len(rows)).backward()
            x = {n: (t - 0.05 * t.grad).detach() for n, t in leaves.items()}  # type: ignore[operator]
        kept = found.private(client)["params"]
        assert all(torch.allclose(kept[n], x[n], atol=1e-5) for n in x)


def test_alone_is_fedavg_with_one_client(play: Any, people: Any, net: Any) -> None:
    kept = play(Local(train=TRAIN), people, 1, **net).private("q")["params"]
    other = play(FedAvg(train=TRAIN), {"q": people["q"]}, 1, **net).state.params
    assert all(torch.allclose(kept[n], other[n], atol=3e-7) for n in kept)


def test_its_own_weights_are_measured(play: Any, people: Any, net: Any) -> None:
    found = play(Local(train=TRAIN), people, 2, measure=True, cohorts=[["p", "q"], ["p"]], **net)
    assert set(found.counts) == set(people)
    for client, rows in people.items():
        own = found.private(client).get("params", net["start"])
        expected = sum(net["loss"](own, [torch.tensor(row)]).item() for row in rows)
        assert found.counts[client]["loss"] == pytest.approx(expected, rel=1e-5)
        assert found.counts[client]["examples"] == len(rows)
    assert found.worker.private.clients() == ["p", "q"], "measuring writes nothing, and those never asked keep nothing"


def test_no_weight_leaves_a_client(play: Any, people: Any, net: Any) -> None:
    found = play(Local(train=TRAIN), people, 2, **net)
    assert set(found.server.meter.bytes) == {"work/down/header", "work/up/header"}
    assert Local().reducer == {}
    assert Local.private == ("params",)


def test_a_round_of_nobody_fails(play: Any, people: Any, net: Any, same: Any) -> None:
    found = play(Local(train=TRAIN), {**people, "empty": []}, 1, cohorts=[["empty"]], **net)
    assert found.records[0].failed
    assert same(found.states[0], found.states[1])
