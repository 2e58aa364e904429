"""FedAvg - the fixed point of the card, weights by examples, and what one client alone becomes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy
import pytest
import torch

from fedllm.core.message import Received, Upload
from fedllm.core.method import on_client
from fedllm.core.train import Train
from fedllm.core.work import Client
from fedllm.methods.baseline.fedavg import FedAvg


def test_two_quadratic_clients(play: Any, two: Any, ten_steps: Train) -> None:
    """The fixed point is sum(a_i b_i) / sum(a_i) with a_i = 1 - (1 - lr h_i)^K, not the optimum 5/6."""
    pulls = {h: 1 - (1 - 0.1 * h) ** 10 for h in (1, 5)}
    expected = pulls[5] / (pulls[1] + pulls[5])
    assert expected == pytest.approx(0.605342, abs=1e-6)
    found = play(FedAvg(train=ten_steps, weighting="uniform"), two, 40)
    assert found.w == pytest.approx(expected, abs=1e-6)
    assert not any(r.failed or r.lost or r.rejected for r in found.records)


def test_every_round_against_plain_numpy(play: Any) -> None:
    """Full-batch descent on sums of quadratics, weighted by examples, written out."""
    stream = numpy.random.default_rng(5)
    data = {
        c: [(float(h), float(b)) for h, b in zip(stream.uniform(0.5, 3, n), stream.normal(size=n), strict=True)]
        for c, n in (("a", 2), ("b", 7), ("c", 4))
    }
    train = Train(steps=3, lr=0.2, optimizer="sgd", clip_norm=None, batch_size=50)
    found = play(FedAvg(train=train), data, 4)
    x = 0.0
    for number in range(4):
        change, total = 0.0, 0
        for rows in data.values():
            y = x
            for _ in range(3):
                y -= 0.2 * sum(h * (y - b) for h, b in rows) / len(rows)
            change, total = change + len(rows) * (y - x), total + len(rows)
        x += change / total
        assert found.states[number + 1].params["w"].item() == pytest.approx(x, abs=1e-6)


class Watched(FedAvg):
    """Keeps what local training ended with."""

    card = FedAvg.card
    ends: ClassVar[dict[str, torch.Tensor]] = {}

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """As FedAvg."""
        report = await client.fit(received.params, self.train)
        self.ends.update(report.params)
        return Upload(report.delta, weight=client.size, metrics=report.metrics)


def test_one_client_is_training_alone(play: Any, people: Any, net: Any) -> None:
    """x + (y - x): y up to the rounding of the difference."""
    found = play(Watched(train=Train(steps=4, lr=0.05)), {"p": people["p"]}, 1, **net)
    assert (found.records[0].used, found.records[0].cohort) == (1, ["p"])
    for name, end in Watched.ends.items():
        assert torch.allclose(found.state.params[name], end, rtol=0, atol=3e-7)
        assert not torch.equal(end, net["start"][name])


def halves(rows: list[Any]) -> tuple[list[Any], list[Any]]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]


def test_splitting_a_client_into_identical_halves_changes_nothing(play: Any, people: Any, net: Any) -> None:
    train = Train(steps=5, lr=0.05, optimizer="sgd", clip_norm=None, batch_size=64)
    twice = people["q"] + people["q"]
    first, second = halves(twice)
    whole = play(FedAvg(train=train), {"p": people["p"], "q": twice}, 3, **net)
    split = play(FedAvg(train=train), {"p": people["p"], "q1": first, "q2": second}, 3, **net)
    assert all(torch.allclose(whole.state.params[n], split.state.params[n], atol=1e-6) for n in net["start"])
    unequal = play(FedAvg(train=train, weighting="uniform"), {"p": people["p"], "q1": first, "q2": second}, 3, **net)
    assert not all(torch.allclose(whole.state.params[n], unequal.state.params[n], atol=1e-3) for n in net["start"])


def test_the_loss_of_a_round_is_pooled_over_examples(play: Any, two: Any) -> None:
    """One step of one example each: the losses at the start are 0 and 2.5."""
    train = Train(steps=1, lr=0.1, optimizer="sgd", clip_norm=None, batch_size=1)
    found = play(FedAvg(train=train), two, 1)
    assert found.records[0].loss == pytest.approx(1.25)


def test_no_state_but_the_weights(play: Any, two: Any, ten_steps: Train) -> None:
    found = play(FedAvg(train=ten_steps), two, 2)
    assert found.state.memory == {}
    assert found.worker.private.clients() == []
    assert found.state.round == 2
