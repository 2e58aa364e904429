"""MedVQA-pFL - weights over the others, halves of a prompt, what travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import ConfigError, RoundFailed
from fedllm.core.message import Received
from fedllm.core.state import State
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.core.work import ScoreReport
from fedllm.effects.medvqa_pfl import rig
from fedllm.effects.rig import Play
from fedllm.methods.applications.medvqa_pfl import MedVQA, accuracy, reliability

PROMPTS = {name: torch.tensor(row) for name, row in {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 1.0]}.items()}
STEPS = Train(steps=3, lr=0.05, batch_size=4)


def played(rounds: int, clients: int = 5, **options: Any) -> Play:
    learner, rows = rig(0)
    chosen = dict(list(rows.items())[:clients])
    play = Play(MedVQA(**{"train": STEPS, **options}), learner, chosen, rounds=rounds)
    play.rounds(rounds)
    return play


@given(st.lists(st.just(0.0) | st.floats(0.001, 1), min_size=3, max_size=3), st.floats(0.01, 100))
def test_weights_are_shares_of_the_others_and_scale_does_not_matter(trust: Sequence[float], scale: float) -> None:
    said = dict(zip(PROMPTS, trust, strict=True))
    for client in PROMPTS:
        weights = reliability(client, PROMPTS, said)
        assert client not in weights and sum(weights.values()) == pytest.approx(1.0)
        scaled = reliability(client, PROMPTS, {n: value * scale for n, value in said.items()})
        assert scaled == pytest.approx(weights, rel=1e-5)


def test_an_accuracy_of_zero_counts_for_nothing_and_equals_share_alike() -> None:
    assert reliability("b", PROMPTS, {"a": 0.0, "b": 1.0, "c": 0.5}) == {"a": 0.0, "c": 1.0}
    assert reliability("b", PROMPTS, {"a": 0.5, "b": 0.1, "c": 0.5}) == pytest.approx({"a": 0.5, "c": 0.5})
    assert reliability("a", PROMPTS, {"a": 1.0, "b": 0.5, "c": 0.5}) == pytest.approx({"b": 1.0, "c": 0.0})


def test_opposite_prompts_get_no_negative_weight_and_nothing_left_is_uniform() -> None:
    prompts = {"a": torch.tensor([1.0]), "b": torch.tensor([-1.0]), "c": torch.tensor([-2.0])}
    assert reliability("a", prompts, dict.fromkeys(prompts, 1.0)) == {"b": 0.5, "c": 0.5}
    assert reliability("b", prompts, dict.fromkeys(prompts, 1.0)) == {"a": 0.0, "c": 1.0}


def test_of_two_clients_each_receives_the_others_prompt() -> None:
    play = played(2, clients=2)
    own = play.state.memory["own"]
    for client, other in (("dark", "plain"), ("plain", "dark")):
        half, mix = play.method.distribute(play.state, play.server.member(client)).params["prompt"].chunk(2)
        assert torch.equal(half, own[client]) and torch.equal(mix, own[other])


def test_one_client_trains_alone() -> None:
    play = played(2, clients=1)
    received = play.method.distribute(play.state, play.server.member("plain"))
    assert received.numbers["alone"] and torch.equal(*received.params["prompt"].chunk(2))
    assert play.records[-1].failed is None and list(play.state.memory["own"]) == ["plain"]


def test_half_a_prompt_and_one_number_travel_up() -> None:
    play = played(1)
    found = play.server.meter.bytes
    assert found["work/up/own"] == 5 * 4 * 2 * 16
    sent = {name for name, size in found.items() if size}
    up = {"work/up/own", "work/up/accuracy", "work/up/header"}  # a number lies in the header, and is told by itself
    assert sent == {"work/down/params", "work/down/header", *up}


def test_the_received_half_is_held_still() -> None:
    method = MedVQA()
    grads = {"prompt": torch.ones(4, 3)}
    assert method.hold(grads, grads, grads)["prompt"].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    prompt = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    MedVQA(near=1.0, small=0.5).alike({"prompt": prompt}, {"prompt": prompt}).backward()
    own, received = prompt.grad.chunk(2)  # type: ignore[union-attr]
    assert bool((own != 0).all()) and not received.any()


def test_the_term_draws_the_own_half_towards_the_received_one() -> None:
    far, near = (played(6, near=value) for value in (0.0, 20.0))

    def likeness(play: Play) -> float:
        found = []
        for client in play.server.clients:
            halves = play.method.distribute(play.state, play.server.member(client)).params["prompt"].chunk(2)
            found.append(float(torch.nn.functional.cosine_similarity(*(h.flatten() for h in halves), 0)))
        return sum(found) / len(found)

    assert likeness(near) > likeness(far) + 0.02


def test_an_absent_client_keeps_its_prompt_and_a_newcomer_begins_at_the_first() -> None:
    play = played(1, clients=3)
    before = dict(play.state.memory["own"])
    received = play.method.distribute(play.state, play.server.member("newcomer"))
    own, _ = received.params["prompt"].chunk(2)
    assert torch.equal(own, play.state.params["prompt"].chunk(2)[0])
    play.cohort = 1
    play.rounds(1)
    asked = play.records[-1].cohort
    kept = [client for client in before if client not in asked]
    assert len(kept) == 2 and all(torch.equal(before[c], play.state.memory["own"][c]) for c in kept)


def test_an_accuracy_outside_its_range_is_clipped_and_none_is_an_error() -> None:
    assert accuracy(ScoreReport({}, {"loss": 1.0, "exact_match": 0.25})) == 0.25
    with pytest.raises(RoundFailed, match="no accuracy"):
        accuracy(ScoreReport({}, {"loss": 1.0}))


@pytest.mark.parametrize(
    ("given_start", "told"),
    [
        ({"prompt": torch.zeros(3, 2)}, "adapter.tokens even"),
        ({"x.lora_A": torch.zeros(2, 2)}, "two halves"),
    ],
)
def test_what_has_no_halves_is_refused(given_start: Tensors, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        MedVQA().init(given_start)


def test_weight_decay_is_refused() -> None:
    with pytest.raises(ConfigError, match="received half"):
        MedVQA(train=Train(weight_decay=0.1))


def test_the_first_state_knows_nobody() -> None:
    state = MedVQA().init({"prompt": torch.zeros(4, 2)})
    assert isinstance(state, State) and state.memory == {"own": {}}
    assert Received(None).parts == {}
