"""Canaries in whole rounds: what they prove stays below what is accounted, and a cheat is found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.tensors import Tensors
from fedllm.effects.rig import Play
from fedllm.methods import find
from fedllm.modes.privacy.audit import audit
from fedllm.modes.privacy.central import Central
from fedllm.modes.privacy.examples import Examples
from fedllm.modes.privacy.settings import PrivacySettings
from fedllm.tasks.function import FunctionLearner

pytest.importorskip("dp_accounting")
TRIALS, SIZE, DELTA = 160, 8, 1e-3


def learner() -> FunctionLearner:
    def loss(params: Tensors, examples: Any) -> torch.Tensor:
        return sum((-params["w"] * x).sum() for x in examples)  # type: ignore[return-value]

    return FunctionLearner(loss, {"w": torch.zeros(SIZE)})


def row(value: float) -> dict[str, Any]:
    """Everybody pulls along the second entry, the canary along the first one."""
    return {"x": [value, 0.0 if value else 1.0, *[0.0] * (SIZE - 2)]}


def scores(level: str, canary: bool, noise: float, cheat: float = 1.0) -> list[float]:
    """How far each run's first entry moved; `cheat` is the share of the stated noise that is really added."""
    train = {"steps": 1, "batch_size": 4, "lr": 1.0, "optimizer": "sgd", "clip_norm": None}
    method = find("fedavg")(train=train, weighting="uniform")
    found = []
    for seed in range(TRIALS):  # with and without the canary under other seeds: trials must be independent
        given = PrivacySettings(level=level, noise=noise * cheat, delta=DELTA, key="seed", rate=1.0)  # type: ignore[arg-type]
        if level == "client":
            rows = {f"c{k}": [row(0.0)] for k in range(3)} | ({"canary": [row(50.0)]} if canary else {})
            guard: Any = Central(given, method, 4, 4, 1, seed + 10_000 * canary)
        else:
            rows = {"c0": [row(0.0)] * 3 + ([row(50.0)] if canary else [])}
            guard = Examples(given, {"c0": 4}, method.train, 1, seed + 10_000 * canary)
        play = Play(method, learner(), rows, guard=guard, seed=seed)
        play.rounds(1)
        assert play.records[0].failed is None
        found.append(float(play.state.params["w"][0]))
    return found


@pytest.mark.parametrize("level", ["client", "example"])
def test_canaries_prove_less_than_is_accounted(level: str) -> None:
    inside, outside = scores(level, True, 0.5), scores(level, False, 0.5)
    from fedllm.modes.privacy.accounting import Sampled, spent

    accounted = spent([(Sampled(0.5, 1.0), 1)], DELTA).epsilon
    found = audit(inside, outside, DELTA)
    assert 0.3 < found.epsilon <= accounted, (found, accounted)


@pytest.mark.parametrize("level", ["client", "example"])
def test_less_noise_than_stated_is_found_out(level: str) -> None:
    from fedllm.modes.privacy.accounting import Sampled, spent

    accounted = spent([(Sampled(4.0, 1.0), 1)], DELTA).epsilon
    inside = scores(level, True, 4.0, cheat=0.05)
    outside = scores(level, False, 4.0, cheat=0.05)
    assert audit(inside, outside, DELTA).refutes(accounted)
