"""FedProx - the fixed points of the card, mu = 0, and the gradient of the pull."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedllm.core.train import Train
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.baseline.fedprox import FedProx


def reference(mu: float, rounds: int) -> float:
    x = 0.0
    for _ in range(rounds):
        ends = []
        for h, b in ((1.0, 0.0), (5.0, 1.0)):
            y = x
            for _ in range(10):
                y -= 0.1 * (h * (y - b) + mu * (y - x))
            ends.append(y)
        x = sum(ends) / 2
    return x


@pytest.mark.parametrize(("mu", "card", "rounds"), [(1.0, 0.6512, 60), (4.0, 0.7355, 120)])
def test_two_quadratic_clients(play: Any, two: Any, ten_steps: Train, mu: float, card: float, rounds: int) -> None:
    assert reference(mu, 300) == pytest.approx(card, abs=5e-5)
    found = play(FedProx(train=ten_steps, weighting="uniform", mu=mu), two, rounds)
    assert found.w == pytest.approx(reference(mu, rounds), abs=1e-6)
    assert found.w == pytest.approx(reference(mu, 300), abs=1e-6)


@pytest.mark.parametrize(
    "train",
    [
        Train(steps=4, lr=0.05),
        Train(steps=4, lr=0.05, optimizer="sgd", momentum=0.9, batch_size=2, clip_norm=None),
        Train(epochs=2, lr=0.05, batch_size=3, accumulate=2, weight_decay=0.1),
    ],
)
def test_no_pull_is_fedavg_to_the_last_bit(play: Any, people: Any, net: Any, same: Any, train: Train) -> None:
    prox = play(FedProx(train=train, mu=0.0), people, 3, **net)
    plain = play(FedAvg(train=train), people, 3, **net)
    assert all(same(a, b) for a, b in zip(prox.states, plain.states, strict=True))
    assert prox.server.meter.bytes == plain.server.meter.bytes
    pulled = play(FedProx(train=train, mu=1.0), people, 3, **net)
    assert not same(pulled.state, plain.state)


def test_the_first_step_of_a_round_feels_no_pull(play: Any, people: Any, net: Any, same: Any) -> None:
    train = Train(steps=1, lr=0.05, optimizer="sgd", clip_norm=None)
    assert same(
        play(FedProx(train=train, mu=9.0), people, 2, **net).state, play(FedAvg(train=train), people, 2, **net).state
    )


def test_the_pull_is_half_mu_times_the_squared_distance() -> None:
    method = FedProx(mu=0.5)
    params = {"a": torch.tensor([1.0, 2.0], requires_grad=True), "b": torch.tensor([[3.0]], requires_grad=True)}
    start = {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([[5.0]])}
    pull = method.pull(params, start)
    assert pull.item() == 0.25 * (1 + 0 + 4)
    pull.backward()
    assert params["a"].grad is not None and params["a"].grad.tolist() == [0.5, 0.0]
    assert params["b"].grad is not None and params["b"].grad.tolist() == [[-1.0]]


def test_the_pull_counts_once_per_step_however_many_passes_a_step_takes(play: Any, two: Any) -> None:
    """Two identical rows in two passes of one step are the same step as one row in one pass."""
    doubled = {client: rows * 2 for client, rows in two.items()}
    one = Train(steps=5, lr=0.1, optimizer="sgd", clip_norm=None, batch_size=2)
    many = Train(steps=5, lr=0.1, optimizer="sgd", clip_norm=None, batch_size=1, accumulate=2)
    left = play(FedProx(train=one, mu=2.0), doubled, 3)
    right = play(FedProx(train=many, mu=2.0), doubled, 3)
    assert left.w == pytest.approx(right.w, abs=1e-6)


def test_the_published_default_and_what_is_refused() -> None:
    assert FedProx().mu == 0.01
    with pytest.raises(ValidationError):
        FedProx(mu=-0.1)
    with pytest.raises(ValidationError, match="prox_mu"):
        FedProx(prox_mu=0.1)  # type: ignore[call-arg]
