"""FedYogi - the second moment moves by exactly (1 - b2) d^2, and three conventions against plain numbers."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

from fedllm.methods.baseline.fedyogi import FedYogi

CHANGES = numpy.random.default_rng(4).normal(size=(8, 3)) * [1.0, 0.05, 4.0]


def test_the_second_moment_moves_by_a_bounded_amount(script: Any) -> None:
    states = script(FedYogi(beta2=0.9), list(torch.tensor(CHANGES)))
    v = numpy.full(3, 1e-3**2)
    for t, d in enumerate(CHANGES, 1):
        moved = states[t].memory["v"]["w"].double().numpy() - v
        assert numpy.abs(moved) == pytest.approx(0.1 * d**2, rel=1e-4, abs=1e-7)
        assert (numpy.sign(moved) == numpy.sign(d**2 - v)).all()
        v = states[t].memory["v"]["w"].double().numpy()


def test_the_second_moment_stays_where_it_is_right(script: Any) -> None:
    method = FedYogi()
    assert method.second(torch.tensor([4.0]), torch.tensor([2.0])).item() == 4.0
    assert method.second(torch.tensor([4.0]), torch.tensor([0.0])).item() == 4.0


@pytest.mark.parametrize("convention", ["paper", "openfedllm", "flower"])
def test_against_plain_numbers(script: Any, convention: Any) -> None:
    eta, tau, b1, b2 = 0.01, 1e-3, 0.9, 0.99
    states = script(FedYogi(server_lr=eta, convention=convention), list(torch.tensor(CHANGES)))
    x, m = numpy.zeros(3), numpy.zeros(3)
    v = numpy.zeros(3) if convention == "flower" else numpy.full(3, tau**2)
    for t, d in enumerate(CHANGES, 1):
        m = d if convention == "openfedllm" and t == 1 else b1 * m + (1 - b1) * d
        seen = m if convention == "openfedllm" else d
        v = v - (1 - b2) * seen**2 * numpy.sign(v - seen**2)
        x = x + eta * m / (v**0.5 + tau)
        assert states[t].params["w"].numpy() == pytest.approx(x, abs=1e-5)
        assert states[t].memory["v"]["w"].numpy() == pytest.approx(v, abs=1e-6)


def test_the_second_moment_never_turns_negative(script: Any) -> None:
    """v is lowered only where v > d^2, by less than d^2: its root stays real."""
    changes = [torch.tensor(row) for row in numpy.random.default_rng(0).normal(size=(200, 4)) ** 3]
    states = script(FedYogi(beta2=0.0), changes)
    assert all(bool((s.memory["v"]["w"] >= 0).all()) for s in states[1:])
    assert bool(torch.isfinite(states[-1].params["w"]).all())
