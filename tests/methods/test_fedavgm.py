"""FedAvgM - both published forms, move by move, and beta = 0."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedllm.core.train import Train
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.baseline.fedavgm import FedAvgM


def moves(states: list[Any]) -> list[float]:
    return [(b.params["w"] - a.params["w"])[0].item() for a, b in itertools.pairwise(states)]


def test_heavy_ball_moves_1_then_1_9_then_2_71(script: Any) -> None:
    assert moves(script(FedAvgM(), [1.0, 1.0, 1.0])) == pytest.approx([1.0, 1.9, 2.71], abs=1e-6)


def test_heavy_ball_gains_a_factor_of_ten_in_the_long_run(script: Any) -> None:
    assert moves(script(FedAvgM(), [1.0] * 150))[-1] == pytest.approx(10.0, abs=1e-4)


def test_the_mean_form_has_no_gain(script: Any) -> None:
    """m = d in the first round, then a mean: for d = 1 it stays 1."""
    assert moves(script(FedAvgM(convention="mean"), [1.0] * 5)) == pytest.approx([1.0] * 5, abs=1e-6)
    assert moves(script(FedAvgM(convention="mean"), [1.0, 2.0, 0.0])) == pytest.approx([1.0, 1.1, 0.99], abs=1e-6)


@pytest.mark.parametrize("convention", ["heavy-ball", "mean"])
def test_against_plain_numbers(script: Any, convention: Any) -> None:
    changes = [0.3, -1.2, 0.0, 2.5, 0.7]
    states = script(FedAvgM(beta=0.6, server_lr=0.5, convention=convention), changes)
    x = m = 0.0
    for number, d in enumerate(changes):
        share = 1.0 if convention == "heavy-ball" or number == 0 else 0.4
        m = 0.6 * m + share * d
        x += 0.5 * m
        assert states[number + 1].params["w"].item() == pytest.approx(x, abs=1e-6)
        assert states[number + 1].memory["momentum"]["w"].item() == pytest.approx(m, abs=1e-6)


@pytest.mark.parametrize("convention", ["heavy-ball", "mean"])
def test_beta_zero_is_fedavg_to_the_last_bit(play: Any, people: Any, net: Any, convention: Any) -> None:
    train = Train(steps=3, lr=0.05)
    momentum = play(FedAvgM(train=train, beta=0.0, convention=convention), people, 3, **net)
    plain = play(FedAvg(train=train), people, 3, **net)
    for left, right in zip(momentum.states, plain.states, strict=True):
        assert all(torch.equal(left.params[n], right.params[n]) for n in left.params)


def test_the_first_round_is_fedavg_to_the_last_bit(play: Any, people: Any, net: Any) -> None:
    train = Train(steps=3, lr=0.05)
    first = play(FedAvgM(train=train), people, 1, **net).state
    plain = play(FedAvg(train=train), people, 1, **net).state
    assert all(torch.equal(first.params[n], plain.params[n]) for n in plain.params)


def test_the_momentum_is_kept_in_single_precision(script: Any) -> None:
    states = script(FedAvgM(), [1.0, 2.0**-9], start={"w": torch.zeros(1, dtype=torch.bfloat16)})
    assert states[-1].memory["momentum"]["w"].dtype == torch.float32
    assert states[-1].memory["momentum"]["w"].item() == pytest.approx(0.9 + 2**-9, abs=1e-7)
    assert states[-1].params["w"].dtype == torch.bfloat16


def test_a_failed_round_keeps_the_momentum(play: Any, people: Any, net: Any, same: Any) -> None:
    """Nobody has rows in the second round: weights and momentum stay to the last bit."""
    train = Train(steps=2, lr=0.05)
    data = {**people, "empty": []}
    found = play(FedAvgM(train=train), data, 2, cohorts=[sorted(people), ["empty"]], **net)
    assert found.records[1].failed == "no usable upload arrived"
    assert same(found.states[1], found.states[2])
    assert found.states[2].round == 2


def test_defaults_and_refusals() -> None:
    assert (FedAvgM().beta, FedAvgM().server_lr, FedAvgM().convention) == (0.9, 1.0, "heavy-ball")
    for options in ({"beta": 1.0}, {"beta": -0.1}, {"server_lr": 0.0}, {"convention": "flower"}):
        with pytest.raises(ValidationError):
            FedAvgM(**options)  # type: ignore[arg-type]
