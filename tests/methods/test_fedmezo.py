"""FedMeZO - (seed, step) replays what clients walked; rates by client; what is refused."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedllm.blocks.zeroth import direction, replay
from fedllm.core.errors import ConfigError
from fedllm.core.message import Upload
from fedllm.core.method import on_client
from fedllm.core.roster import Member
from fedllm.core.state import State
from fedllm.core.train import Train
from fedllm.core.wire import decode
from fedllm.engine.rounds import play_round
from fedllm.methods.evaluation.fedmezo import FedMeZO

TRAIN = Train(steps=5, batch_size=2, lr=0.01, optimizer="sgd", clip_norm=None)
RATES = ("frozen", "random", "round-wise", "five-round", "model-diff")


def method(**options: Any) -> FedMeZO:
    return FedMeZO(**{"train": TRAIN, **options})


def listen(played: Any) -> dict[str, Any]:
    """Every later upload, by client."""
    answer, seen = played.worker.answer, {}

    def listening(requests: Any) -> Any:
        for reply in answer(requests):
            seen[reply.client] = decode(reply.body)
            yield reply

    played.worker.answer = listening
    return seen


@pytest.mark.parametrize("rates", ["frozen", "random", "round-wise", "five-round"])
def test_pairs_are_the_same_run_as_changes(play: Any, people: Any, net: Any, rates: Any) -> None:
    """Invariant (b): the server's replay is the clients' walk, in float32."""
    a, b = (play(method(rates=rates, upload=u), people, 3, **net) for u in ("change", "pairs"))
    for name in a.state.params:
        assert torch.allclose(a.states[1].params[name], b.states[1].params[name], atol=1e-6), name
        assert torch.allclose(a.state.params[name], b.state.params[name], atol=1e-3), "slopes magnify rounding by 1/eps"
        assert not torch.equal(a.state.params[name], a.states[0].params[name])
    change, pairs = (p.server.meter.bytes["work/up/update"] for p in (a, b))
    assert pairs == 3 * 4 * 5 * 8 and change == 3 * 4 * 4 * sum(t.numel() for t in a.state.params.values())


def test_a_change_lies_in_the_span_of_its_directions(play: Any, people: Any, net: Any) -> None:
    """Invariant (d), and replay from the pairs of the very same client."""
    params = play(method(), {"q": people["q"]}, 1, **net).state.params
    probe = play(method(upload="pairs"), {"q": people["q"]}, 0, **net)
    seen = listen(probe)
    asyncio.run(play_round(probe.worker.algorithm, probe.state, probe.server, 1))
    seeds, values = seen["q"].update["seed"].tolist(), seen["q"].update["value"]
    moved = torch.cat([(params[n] - net["start"][n]).flatten() for n in params]).double()
    basis = torch.stack([torch.cat([direction(s, n, params[n]).flatten() for n in params]).double() for s in seeds], 1)
    assert float((moved - basis @ torch.linalg.lstsq(basis, moved).solution).abs().max()) < 1e-6
    back = replay(net["start"], seeds, values, -1.0)
    assert all(torch.allclose(back[n], params[n], atol=1e-6) for n in params)
    assert len(set(seeds)) == 5


def state(signals: dict[str, list[float]]) -> State:
    return State({}, numbers={"signals": signals, "master": 3})


@pytest.mark.parametrize("rates", ["round-wise", "model-diff"])
def test_rates_follow_signals(rates: Any) -> None:
    """Invariant (c): within [lr - c, lr + c], their mean is lr, the largest signal has the largest rate."""
    made = method(rates=rates, spread=0.4)
    held = state({"a": [9.0, 1.0], "b": [2.0], "c": [4.5]})
    found = {c: made.rate(held, c) for c in "abc"}
    assert found["c"] == pytest.approx(0.014) and found["a"] < found["b"] < 0.01
    assert sum(found.values()) / 3 == pytest.approx(0.01)
    assert all(0.006 <= rate <= 0.014 for rate in found.values())
    assert made.rate(held, "stranger") == 0.01, "no signal: the base rate"
    assert made.distribute(held, Member("c")).numbers == {"lr": found["c"]}


def test_five_rounds_are_waited_for() -> None:
    made = method(rates="five-round")
    young = state({"a": [1.0] * 4, "b": [3.0] * 4})
    assert made.rate(young, "a") == made.rate(young, "b") == 0.01
    old = state({"a": [1.0, 1.0, 1.0, 1.0, 1.0], "b": [0.0, 0.0, 0.0, 0.0, 15.0]})
    assert made.rate(old, "a") == pytest.approx(0.005) and made.rate(old, "b") == pytest.approx(0.015)


@pytest.mark.parametrize("rates", RATES)
def test_equal_signals_and_one_client_have_the_base_rate(rates: Any) -> None:
    if rates == "random":
        pytest.skip("draws, whatever the signals are")
    made = method(rates=rates)
    assert made.rate(state({"a": [2.0] * 5, "b": [2.0] * 5}), "a") == 0.01
    assert made.rate(state({"a": [2.0] * 5}), "a") == 0.01


def test_drawn_rates_are_inside_and_differ() -> None:
    made = method(rates="random", spread=0.5)
    found = [made.rate(replace(state({}), round=r), c) for r in range(20) for c in "abcd"]
    assert all(0.005 <= rate <= 0.015 for rate in found) and len(set(found)) == 80
    assert found == [made.rate(replace(state({}), round=r), c) for r in range(20) for c in "abcd"]


def test_signals_of_a_run(play: Any, people: Any, net: Any) -> None:
    found = play(method(rates="round-wise"), people, 7, **net)
    signals = found.state.numbers["signals"]
    assert {c: len(s) for c, s in signals.items()} == dict.fromkeys(people, 5)
    cohorts = [["p", "q"], ["q", "r"]]
    some = play(method(rates="round-wise"), people, 2, cohorts=cohorts, **net).state.numbers["signals"]
    assert {c: len(s) for c, s in some.items()} == {"p": 1, "q": 2, "r": 1}
    assert not play(method(), people, 1, **net).state.numbers["signals"], "one rate: no loss is told"


def test_model_diff_is_the_distance_to_the_weighted_mean(play: Any, people: Any, net: Any) -> None:
    found = play(method(rates="model-diff"), people, 2, **net)
    plain = play(method(), people, 1, **net)
    for name, tensor in plain.state.params.items():
        assert torch.allclose(found.states[1].params[name], tensor, atol=1e-6), "its mean is FedAvg's"
    alone = {c: play(method(), {c: people[c]}, 1, **net).state.params for c in people}
    mean = plain.state.params
    for client, (signal,) in found.states[1].numbers["signals"].items():
        exact = sum(float((alone[client][n] - mean[n]).norm()) for n in mean)
        assert signal == pytest.approx(exact, rel=1e-4)
    assert not torch.equal(found.state.params["w"], play(method(), people, 2, **net).state.params["w"])


class Lossless(FedMeZO, abstract=True):
    """Client q says nothing of its loss, or something that is no number."""

    what: Any = None
    """What it says."""

    @on_client
    async def work(self, client: Any, received: Any) -> Upload:
        """As FedMeZO, but for q."""
        upload = await super().work(client, received)
        if client.id == "q":
            values = upload.parts["signal"].values  # type: ignore[attr-defined]
            values.clear()
            values.update({} if self.what is None else {"loss": self.what})
        return upload


def test_a_client_without_a_loss_keeps_the_base_rate(play: Any, people: Any, net: Any) -> None:
    quiet = Lossless(train=TRAIN, rates="round-wise")
    found = play(quiet, people, 1, **net)
    assert set(found.state.numbers["signals"]) == set(people) - {"q"} and found.records[0].used == 4
    assert quiet.rate(found.state, "q") == 0.01
    bad = play(Lossless(train=TRAIN, rates="round-wise", what=math.nan), people, 1, **net)
    assert [r["client"] for r in bad.records[0].rejected] == ["q"]


def test_linear_where_it_is() -> None:
    assert method().linear() and method(rates="random").linear()
    for options in ({"rates": "round-wise"}, {"rates": "model-diff"}, {"upload": "pairs"}):
        assert not method(**options).linear()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"upload": "pairs", "rates": "model-diff"}, r"model-diff looks at .* Set method\.upload=change"),
        ({"upload": "pairs", "train": TRAIN.model_copy(update={"weight_decay": 0.1})}, "weight_decay=0.1 cannot"),
        ({"train": Train()}, "optimizer=adamw cannot be used: a zeroth-order step"),
        ({"train": Train(optimizer="sgd")}, "clip_norm=1.0 cannot be used"),
    ],
)
def test_what_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FedMeZO(**options)


@pytest.mark.parametrize("options", [{"spread": 1.0}, {"spread": -0.1}, {"eps": 0}, {"rates": "fast"}])
def test_no_rate_can_be_negative(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FedMeZO(**options)


def test_decay_works_on_changes(play: Any, people: Any, net: Any) -> None:
    decayed = TRAIN.model_copy(update={"weight_decay": 0.5})
    found, plain = play(method(train=decayed), people, 1, **net), play(method(), people, 1, **net)
    assert float(found.state.params["w"].norm()) < float(plain.state.params["w"].norm())
