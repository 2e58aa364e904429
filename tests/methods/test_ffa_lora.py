"""FFA-LoRA - A stays, B alone travels, and the average is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.blocks.lora import pairs
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received
from fedllm.effects.ffa_lora import gap, moved
from fedllm.effects.lora_rig import TRAIN, Play, clients, learner
from fedllm.methods.privacy.ffa_lora import FFALoRA
from fedllm.tasks.function import FunctionLearner


def method(**options: Any) -> FFALoRA:
    return FFALoRA.model_validate({"train": TRAIN, **options})


def play(rounds: int = 3, **options: Any) -> Play:
    found = Play(method(**options), learner(4), clients(0, alpha=0.3), rounds=rounds)
    found.rounds(rounds)
    return found


def test_a_never_moves_and_never_travels() -> None:
    found, first = play(), learner(4).initial()
    for name, tensor in found.state.params.items():
        assert torch.equal(tensor, first[name]) == name.endswith(".lora_A"), name
    for upload in found.uploads.values():
        assert set(upload.update) == {name for name in first if name.endswith(".lora_B")}
    sent = found.method.distribute(found.state, found.server.member("c0"))
    assert set(sent.params) == set(found.uploads["c0"].update) and list(sent.parts) == ["params"]


def test_bytes_are_those_of_b() -> None:
    """sum over layers of out * rank * 4, from each of six clients, each way."""
    found, per_message = play(1), (64 + 64) * 4 * 4
    assert found.server.meter.bytes["work/up/update"] == 6 * per_message
    assert found.server.meter.bytes["work/down/params"] == 6 * per_message


def test_a_round_is_the_mean_of_dense_changes() -> None:
    found = Play(method(), learner(4), clients(0, alpha=0.3), rounds=2)
    for _ in range(2):
        before = dict(found.state.params)
        assert gap(before, found.rounds().params, found.uploads) < 1e-6


def test_noise_on_b_moves_the_weights_in_proportion() -> None:
    params = play(1).state.params
    assert moved(params, (".lora_B",), 0.2, 0) == pytest.approx(2 * moved(params, (".lora_B",), 0.1, 0), rel=1e-5)
    assert moved(params, (".lora_A", ".lora_B"), 0.4, 0) > 2.1 * moved(params, (".lora_A", ".lora_B"), 0.2, 0)


def scaled(scale: float, rank: int = 3) -> FunctionLearner:
    """One linear layer whose LoRA has a scale."""
    stream = torch.Generator().manual_seed(0)
    a = torch.randn(rank, 5, generator=stream)

    def loss(params: Any, examples: Any) -> Any:
        rows = torch.stack(list(examples))
        out = scale * rows[:, :5] @ params["l.lora_A"].T @ params["l.lora_B"].T
        return (out - rows[:, 5:]).square().sum()

    return FunctionLearner(loss, {"l.lora_A": a, "l.lora_B": torch.zeros(2, rank)})


def test_twice_alpha_at_a_quarter_of_the_rate_is_the_same_function() -> None:
    stream = torch.Generator().manual_seed(1)
    rows = {"c0": [{"x": row} for row in torch.randn(12, 7, generator=stream).tolist()]}
    changes = []
    for scale, lr in ((1.0, 0.04), (2.0, 0.01)):
        train = {**TRAIN, "lr": lr, "batch_size": 12}
        found = Play(method(train=train), scaled(scale), rows, rounds=2)
        changes.append(scale * pairs(found.rounds(2).params)["l"].product())
    assert changes[0].any() and torch.allclose(changes[0], changes[1], atol=1e-5)


def test_a_round_is_fedavg_over_b() -> None:
    """The mean of the changes, weighted by examples."""
    found = play(1)
    total = sum(upload.weight for upload in found.uploads.values())
    for name in found.uploads["c0"].update:
        mean = sum(u.update[name].double() * (u.weight / total) for u in found.uploads.values())
        assert torch.allclose(found.state.params[name], mean.float(), atol=1e-7)


def test_the_head_is_an_option() -> None:
    start = {"l.lora_A": torch.eye(2, 4), "l.lora_B": torch.zeros(3, 2), "head.weight": torch.ones(2)}
    assert FFALoRA().trainable("head.weight") and not FFALoRA(head=False).trainable("head.weight")
    assert set(FFALoRA().expected(FFALoRA().init(start))["update"]) == {"l.lora_B", "head.weight"}
    kept = {name: tensor for name, tensor in start.items() if FFALoRA(head=False).trainable(name)}
    assert set(FFALoRA(head=False).expected(FFALoRA(head=False).init(kept))["update"]) == {"l.lora_B"}


@pytest.mark.parametrize(
    ("start", "why"),
    [
        ({"l.lora_A": torch.zeros(2, 4), "l.lora_B": torch.zeros(3, 2)}, "B could learn nothing"),
        ({"l.lora_A": torch.ones(2, 4), "l.lora_B": torch.zeros(3, 2)}, "B could learn nothing"),
        ({"l.lora_A": torch.eye(2, 4), "l.lora_B": torch.ones(3, 2)}, "does not begin at zero.*PiSSA"),
        ({"head.weight": torch.ones(2)}, r"no LoRA factor.*adapter\.kind=lora"),
    ],
)
def test_starts_that_cannot_learn_are_refused(start: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FFALoRA().init(start)


def test_a_client_with_another_a_refuses() -> None:
    """Its reason reaches the record, and nothing is counted of it."""
    found = play(1)
    first = found.worker.learner.initial()
    first["0.lora_A"][0, 0] = torch.nextafter(first["0.lora_A"][0, 0], torch.tensor(9.0))
    found.worker.learner._initial = first  # type: ignore[attr-defined]
    found.rounds()
    record = found.records[-1]
    assert record.used == 0 and len(record.lost) == 6
    assert "frozen A of client" in record.lost[0]["reason"] and "same seed" in record.lost[0]["reason"]


def test_a_message_without_the_fingerprint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = play(1)
    monkeypatch.setattr(FFALoRA, "distribute", lambda self, state, client: Received(state.params))
    found.rounds()
    assert found.records[-1].used == 0 and "not None" in found.records[-1].lost[0]["reason"]


def test_nobody_keeps_b_and_linear_means_sums_in_secret_fit() -> None:
    assert FFALoRA.private == () and FFALoRA().linear() and FFALoRA.adapters == ("lora",)
