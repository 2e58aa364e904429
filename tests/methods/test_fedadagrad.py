"""FedAdagrad - the closed form for a constant change, and every convention against plain numbers."""

from __future__ import annotations

from typing import Any

import pytest

from fedllm.methods.baseline.fedadagrad import FedAdagrad


def test_the_closed_form(script: Any) -> None:
    """d = 1 for ever: round t moves eta / (sqrt(tau^2 + t) + tau)."""
    eta, tau = 0.1, 1e-3
    states = script(FedAdagrad(server_lr=eta, tau=tau), [1.0] * 20)
    for t in range(1, 21):
        move = (states[t].params["w"] - states[t - 1].params["w"]).item()
        assert move == pytest.approx(eta / ((tau**2 + t) ** 0.5 + tau), abs=1e-6)


@pytest.mark.parametrize("convention", ["paper", "openfedllm", "flower"])
def test_against_plain_numbers(script: Any, convention: Any) -> None:
    """v0 is tau^2, and 0 in Flower; m is d in all three; the second moment is that of d in all three."""
    changes, eta, tau = [0.5, -2.0, 0.0, 0.01, 3.0], 0.3, 0.05
    states = script(FedAdagrad(server_lr=eta, tau=tau, convention=convention), changes)
    x, v = 0.0, 0.0 if convention == "flower" else tau**2
    for number, d in enumerate(changes):
        v += d * d
        x += eta * d / (v**0.5 + tau)
        assert states[number + 1].params["w"].item() == pytest.approx(x, abs=1e-6)
        assert states[number + 1].memory["v"]["w"].item() == pytest.approx(v, abs=1e-6)
        assert states[number + 1].memory["m"]["w"].item() == pytest.approx(d)


def test_the_mean_is_uniform_by_default() -> None:
    assert FedAdagrad().weighting == "uniform"
    assert FedAdagrad().tau == 1e-3
