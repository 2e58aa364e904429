"""FedAdam - three conventions against plain numbers, and no bit of memory lost in a failed round."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from pydantic import ValidationError

from fedllm.blocks.adaptive_server import AdaptiveServer
from fedllm.core.train import Train
from fedllm.methods.baseline.fedadam import FedAdam

CHANGES = numpy.random.default_rng(3).normal(size=(8, 3)) * [1.0, 0.05, 4.0]


@pytest.mark.parametrize("convention", ["paper", "openfedllm", "flower"])
def test_against_plain_numbers(script: Any, convention: Any) -> None:
    eta, tau, b1, b2 = 0.1, 1e-3, 0.9, 0.99
    states = script(
        FedAdam(server_lr=eta, tau=tau, beta1=b1, beta2=b2, convention=convention), list(torch.tensor(CHANGES))
    )
    x, m = numpy.zeros(3), numpy.zeros(3)
    v = numpy.zeros(3) if convention == "flower" else numpy.full(3, tau**2)
    for t, d in enumerate(CHANGES, 1):
        first = convention == "openfedllm" and t == 1
        m = d if first else b1 * m + (1 - b1) * d
        seen = m if convention == "openfedllm" else d
        v = b2 * v + (1 - b2) * seen**2
        rate = eta * (1 - b2 ** (t + 1)) ** 0.5 / (1 - b1 ** (t + 1)) if convention == "flower" else eta
        x = x + rate * m / (v**0.5 + tau)
        assert states[t].params["w"].numpy() == pytest.approx(x, abs=1e-5)
        assert states[t].memory["m"]["w"].numpy() == pytest.approx(m, abs=1e-6)
        assert states[t].memory["v"]["w"].numpy() == pytest.approx(v, abs=1e-6)


def test_flowers_first_step(script: Any) -> None:
    """eta sqrt(1 - b2^2) / (1 - b1^2) * (1 - b1) d / (sqrt((1 - b2) d^2) + tau), for d = 1."""
    move = script(FedAdam(server_lr=0.1, convention="flower"), [1.0])[-1].params["w"].item()
    expected = 0.1 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2) * 0.1 / (0.01**0.5 + 1e-3)
    assert move == pytest.approx(expected, abs=1e-6)


def test_a_coordinate_moves_about_eta_a_round_however_large_the_change(script: Any) -> None:
    for size in (1.0, 1e3):
        states = script(FedAdam(server_lr=0.01), [size] * 200)
        assert (states[-1].params["w"] - states[-2].params["w"]).item() == pytest.approx(0.01, rel=0.1)


def test_the_memory_is_kept_through_a_failed_round(play: Any, people: Any, net: Any, same: Any) -> None:
    data = {**people, "empty": []}
    found = play(FedAdam(train=Train(steps=2, lr=0.05)), data, 3, cohorts=[["p"], ["empty"], ["q"]], **net)
    assert found.records[1].failed
    assert same(found.states[1], found.states[2])
    assert not same(found.states[2], found.states[3])
    whole = play(FedAdam(train=Train(steps=2, lr=0.05)), data, 1, cohorts=[["p"]], **net)
    assert same(found.states[1], whole.state)


def test_an_overflowing_second_moment_fails_the_round(play: Any) -> None:
    """x stays finite where v is infinite (m / inf = 0), so looking at x alone would freeze the run for ever."""

    def steep(params: Any, examples: Any) -> Any:
        return (params["w"] * 1e30).sum() * len(examples)

    train = Train(steps=1, lr=1.0, optimizer="sgd", clip_norm=None)
    found = play(FedAdam(train=train), {"a": [(1.0, 0.0)]}, 2, loss=steep)
    assert found.records[0].failed == "the new state is not finite in 'w'"
    assert found.state.memory == {}


def test_the_frame_cannot_be_used_alone() -> None:
    with pytest.raises(TypeError, match="abstract"):
        AdaptiveServer()  # type: ignore[abstract]


def test_defaults_and_refusals() -> None:
    method = FedAdam()
    assert (method.beta1, method.beta2, method.tau, method.convention, method.weighting) == (
        0.9,
        0.99,
        1e-3,
        "paper",
        "uniform",
    )
    for options in ({"beta1": 1.0}, {"beta2": 1.0}, {"tau": 0.0}, {"server_lr": 0.0}, {"convention": "keras"}):
        with pytest.raises(ValidationError):
            FedAdam(**options)  # type: ignore[arg-type]
