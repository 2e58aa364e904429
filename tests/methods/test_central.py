"""Central - one client with all rows, and the budget of a cohort."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.train import Train
from fedllm.methods.baseline.central import EVERYONE, Central
from fedllm.methods.baseline.fedavg import FedAvg


def test_one_client_holds_everything(play: Any, people: Any, net: Any) -> None:
    found = play(Central(train=Train(steps=2)), people, 2, numbers={"cohort": 3}, **net)
    assert [r.cohort for r in found.records] == [[EVERYONE]] * 2
    assert [r.used for r in found.records] == [1, 1]


def test_the_budget_is_that_of_a_cohort(play: Any, people: Any, net: Any) -> None:
    """As many steps on batches of the same size as three clients take."""
    train = Train(steps=2, batch_size=4)
    found = play(Central(train=train), people, 2, numbers={"cohort": 3}, **net)
    assert found.server.meter.steps == 2 * 3 * 2
    assert found.server.meter.tokens == 2 * 3 * 2 * 4, "one token an example here, and no batch is short: 26 rows"
    federated = play(FedAvg(train=train), people, 2, cohort=3, **net)
    assert federated.server.meter.steps == found.server.meter.steps


def test_without_a_cohort_it_is_one_client(play: Any, people: Any, net: Any) -> None:
    assert play(Central(train=Train(steps=2)), people, 1, **net).server.meter.steps == 2


def test_with_epochs_the_budget_is_that_of_clients_of_mean_size(play: Any, people: Any, net: Any) -> None:
    """26 rows at four clients are 6 rows each: two batches of four an epoch."""
    found = play(Central(train=Train(epochs=3, batch_size=4)), people, 1, numbers={"cohort": 2}, **net)
    assert found.server.meter.steps == 3 * 2 * 2


def test_it_is_descent_on_the_pooled_rows(play: Any, people: Any, net: Any) -> None:
    train = Train(steps=1, lr=0.05, optimizer="sgd", clip_norm=None, batch_size=64)
    found = play(Central(train=train), people, 1, numbers={"cohort": 4}, **net)
    rows = [torch.tensor(row) for client in sorted(people) for row in people[client]]
    x = {n: t.clone() for n, t in net["start"].items()}
    for _ in range(4):
        leaves = {n: t.requires_grad_() for n, t in x.items()}
        (net["loss"](leaves, rows) / len(rows)).backward()
        x = {n: (t - 0.05 * t.grad).detach() for n, t in leaves.items()}  # type: ignore[operator]
    assert all(torch.allclose(found.state.params[n], x[n], atol=1e-5) for n in x)


def test_the_joint_optimum_of_the_two_quadratic_clients(play: Any, two: Any) -> None:
    """sum(h b) / sum(h) = 5/6, which no client holds alone."""
    train = Train(steps=5, lr=0.1, optimizer="sgd", clip_norm=None, batch_size=2)
    assert play(Central(train=train), two, 20, numbers={"cohort": 2}).w == pytest.approx(5 / 6, abs=1e-6)


def test_it_says_that_it_is_a_simulation() -> None:
    assert "one place" in Central.card.simulation_only
