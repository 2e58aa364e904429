"""FedIT - FedAvg over the factors of adapters, with the error that later methods exist to mend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.message import Received, Upload
from fedllm.core.method import on_client
from fedllm.core.train import Train
from fedllm.core.work import Client
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.instruction.fedit import FedIT

EYE, ZERO = torch.eye(2), torch.zeros(2, 2)
FACTORS = {"one": (ZERO, EYE), "two": (EYE, ZERO)}
"""A and B of two clients: neither product is anything, and the mean of the products is 0."""


class Given(FedIT):
    """Sends given factors instead of training."""

    card = FedIT.card

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """The change to the client's factors."""
        a, b = FACTORS[client.id]
        start = received.params
        return Upload({"lora_A": a - start["lora_A"], "lora_B": b - start["lora_B"]}, weight=client.size)


def test_averaging_factors_is_not_averaging_products(play: Any) -> None:
    """(B A) of the mean factors is I / 4, while the mean of the products is 0."""
    start = {"lora_A": torch.full((2, 2), 0.3), "lora_B": torch.zeros(2, 2)}
    found = play(Given(), {"one": [(0.0, 0.0)], "two": [(0.0, 0.0)]}, 1, start=start)
    a, b = found.state.params["lora_A"], found.state.params["lora_B"]
    assert torch.allclose(b @ a, EYE / 4, atol=1e-6)
    products = [FACTORS[c][1] @ FACTORS[c][0] for c in FACTORS]
    assert not torch.stack(products).mean(0).any()


def test_factors_are_weighted_by_examples(play: Any) -> None:
    start = {"lora_A": ZERO, "lora_B": ZERO}
    found = play(Given(), {"one": [(0.0, 0.0)] * 3, "two": [(0.0, 0.0)]}, 1, start=start)
    assert torch.allclose(found.state.params["lora_B"], 0.75 * EYE)
    assert torch.allclose(found.state.params["lora_A"], 0.25 * EYE)


def test_it_is_fedavg_to_the_last_bit(play: Any, people: Any, net: Any, same: Any) -> None:
    train = Train(steps=3, lr=0.05)
    left, right = play(FedIT(train=train), people, 2, **net), play(FedAvg(train=train), people, 2, **net)
    assert all(same(a, b) for a, b in zip(left.states, right.states, strict=True))


def test_one_client_is_the_identity(play: Any) -> None:
    start = {"lora_A": torch.full((2, 2), 0.25), "lora_B": ZERO}
    found = play(Given(), {"two": [(0.0, 0.0)] * 7}, 1, start=start)
    assert torch.equal(found.state.params["lora_B"], ZERO)
    assert torch.equal(found.state.params["lora_A"], EYE)


def test_bytes_are_those_of_the_factors(play: Any) -> None:
    """4 r (d + k) a layer, each way, and a header."""
    r, d, k = 2, 5, 3
    start = {f"{layer}.{n}": torch.zeros(s) for layer in ("q", "v") for n, s in (("A", (r, k)), ("B", (d, r)))}

    def flat(params: Any, examples: Any) -> Any:
        return sum((t - 1).square().sum() for t in params.values()) * len(examples)

    found = play(FedIT(train=Train(steps=1)), {"one": [(0.0, 0.0)], "two": [(0.0, 0.0)]}, 1, loss=flat, start=start)
    per_message = 4 * r * (d + k) * 2
    assert found.server.meter.bytes["work/up/update"] == 2 * per_message
    assert found.server.meter.bytes["work/down/params"] == 2 * per_message


def test_it_asks_for_lora() -> None:
    assert FedIT.adapters == ("lora",)
    assert FedIT().linear()
    assert FedIT.private == ()
    with pytest.raises(Exception, match="rank"):
        FedIT(rank=8)  # type: ignore[call-arg]
