"""Ask mean - weighted and plain means outside of rounds; what is wrong is rejected by name."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from fedllm.blocks.ask_mean import ask_mean
from fedllm.core.message import Received, Upload
from fedllm.core.method import on_client
from fedllm.core.work import Client
from fedllm.effects.rig import Play, quadratic
from fedllm.methods.baseline.fedavg import FedAvg


class Telling(FedAvg):
    """Clients tell a number that they were sent, times a weight they were sent; NaN and a wrong shape on request."""

    card = FedAvg.card

    @on_client
    async def tell(self, client: Client, received: Received) -> Upload:
        """The number."""
        value, weight = received.numbers["value"], received.numbers["weight"]
        if value == "nan":
            return Upload({"x": torch.full((1,), float("nan"))})
        return Upload({"x": torch.tensor([float(value)] * received.numbers.get("size", 1))}, weight)


def asked(said: dict[str, dict[str, Any]], weighting: Any = "examples") -> tuple[Any, Play]:
    learner, rows = quadratic()
    play = Play(Telling(), learner, rows)
    payloads = {client: Received(numbers=numbers) for client, numbers in said.items()}
    function = play.method.tell  # type: ignore[attr-defined]
    return asyncio.run(ask_mean(play.server, function, payloads, {"x": torch.zeros(1)}, weighting)), play


def test_means() -> None:
    said = {"a": {"value": 1, "weight": 3}, "b": {"value": 5, "weight": 1}}
    assert asked(said)[0]["x"].item() == pytest.approx(2)
    assert asked(said, "uniform")[0]["x"].item() == pytest.approx(3)


@pytest.mark.parametrize("wrong", [{"value": "nan", "weight": 1}, {"value": 9, "weight": 1, "size": 2}])
def test_a_wrong_answer_does_not_count(wrong: dict[str, Any]) -> None:
    found, play = asked({"a": {"value": 1, "weight": 3}, "b": wrong})
    assert found["x"].item() == 1 and [entry["client"] for entry in play.server.rejected] == ["b"]


def test_without_weight_there_is_no_mean() -> None:
    assert asked({"a": {"value": 1, "weight": 0}})[0] is None
    assert asked({})[0] is None
