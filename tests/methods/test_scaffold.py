"""SCAFFOLD - reaches the joint optimum; control variates add up; private ones stay private and roll back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError
from fedllm.core.message import Received, Upload
from fedllm.core.method import on_client
from fedllm.core.reducer import Mean
from fedllm.core.tensors import Tensors
from fedllm.core.train import Schedule, Train
from fedllm.core.wire import decode
from fedllm.core.work import Client
from fedllm.engine.rounds import play_round
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.baseline.scaffold import Scaffold

PLAIN = Train(steps=4, lr=0.05, optimizer="sgd", clip_norm=None, batch_size=3)


def control(played: Any, client: str, like: Tensors) -> Tensors:
    """A client's c_k: zero where it has none yet."""
    return played.private(client).get("control") or {n: torch.zeros_like(t) for n, t in like.items()}


@pytest.mark.parametrize(("option", "rounds"), [("II", 40), ("I", 60)])
def test_two_quadratic_clients(play: Any, two: Any, ten_steps: Train, option: Any, rounds: int) -> None:
    """The joint optimum itself, where FedAvg stops at 0.605."""
    found = play(Scaffold(train=ten_steps, option=option), two, rounds)
    assert found.w == pytest.approx(5 / 6, abs=1e-6)


def test_at_the_optimum_controls_are_the_clients_gradients(play: Any, two: Any, ten_steps: Train) -> None:
    found = play(Scaffold(train=ten_steps), two, 60)
    for client, (h, b) in {"a": (1, 0), "b": (5, 1)}.items():
        assert found.private(client)["control"]["w"].item() == pytest.approx(h * (5 / 6 - b), abs=1e-5)
    assert found.state.memory["control"]["w"].item() == pytest.approx(0, abs=1e-5)


def test_the_first_round_is_fedavg_to_the_last_bit(play: Any, people: Any, net: Any, same: Any) -> None:
    for train, option in ((PLAIN, "II"), (PLAIN, "I"), (Train(steps=3, lr=0.01), "I")):
        scaffold = play(Scaffold(train=train, option=option), people, 2, **net)
        plain = play(FedAvg(train=train, weighting="uniform"), people, 2, **net)
        first = {n: t for n, t in scaffold.states[1].params.items()}
        assert all(torch.equal(first[n], plain.states[1].params[n]) for n in first)
        assert not torch.equal(scaffold.states[2].params["w"], plain.states[2].params["w"])


def test_one_client_has_the_servers_control(play: Any, people: Any, net: Any) -> None:
    found = play(Scaffold(train=PLAIN), {"q": people["q"]}, 1, **net)
    own = found.private("q")["control"]
    assert all(torch.equal(found.state.memory["control"][n], own[n]) for n in own)
    later = play(Scaffold(train=PLAIN), {"q": people["q"]}, 5, **net)
    own = later.private("q")["control"]
    assert all(torch.allclose(later.state.memory["control"][n], own[n], atol=1e-5) for n in own)


@pytest.mark.parametrize("option", ["I", "II"])
def test_with_everybody_from_the_start_c_is_the_mean_of_c_k(play: Any, people: Any, net: Any, option: Any) -> None:
    for rounds in (1, 2, 5):
        found = play(Scaffold(train=PLAIN, option=option), people, rounds, **net)
        owns = [found.private(client)["control"] for client in people]
        for name, c in found.state.memory["control"].items():
            assert torch.allclose(c, torch.stack([own[name] for own in owns]).mean(0), atol=1e-5)


COHORTS = [["p", "q"], ["q"], ["r", "p", "s"], ["s", "q"]]


def test_the_changes_of_c_k_sum_to_n_times_the_change_of_c(play: Any, people: Any, net: Any) -> None:
    """N counts all clients, also those never asked."""
    runs = [play(Scaffold(train=PLAIN), people, n, cohorts=COHORTS[:n], **net) for n in range(1, len(COHORTS) + 1)]
    before = {client: {n: torch.zeros_like(t) for n, t in net["start"].items()} for client in people}
    server = {n: torch.zeros_like(t) for n, t in net["start"].items()}
    for played, cohort in zip(runs, COHORTS, strict=True):
        after = {client: control(played, client, net["start"]) for client in people}
        new = played.state.memory["control"]
        for name in server:
            moved = sum((after[c][name] - before[c][name] for c in cohort), torch.zeros_like(server[name]))
            assert torch.allclose(moved, len(people) * (new[name] - server[name]), atol=2e-5)
            for other in set(people) - set(cohort):
                assert torch.equal(after[other][name], before[other][name])
        before, server = after, new


def test_a_late_joiner_starts_at_zero(play: Any, people: Any, net: Any) -> None:
    """Its first corrected step is g - 0 + c: checked by hand for one step of full-batch descent."""
    train = Train(steps=1, lr=0.1, optimizer="sgd", clip_norm=None, batch_size=64)
    found = play(Scaffold(train=train), people, 2, cohorts=[["q"], ["p"]], **net)
    assert found.worker.private.clients() == ["p", "q"]
    x, c = found.states[1].params, found.states[1].memory["control"]
    leaves = {n: t.clone().requires_grad_() for n, t in x.items()}
    rows = [torch.tensor(row) for row in people["p"]]
    (net["loss"](leaves, rows) / len(rows)).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        moved = found.state.params[name] - x[name]
        assert torch.allclose(moved, -0.1 * (leaf.grad + c[name]), atol=1e-6)
        assert torch.allclose(found.private("p")["control"][name], leaf.grad, atol=1e-5), "c_k' = c_k - c + (g + c)"


def test_option_two_uses_the_rates_really_used(play: Any, two: Any) -> None:
    """c_k' = c_k - c + (x - y) / (sum of the rates), under a schedule and against plain numbers."""
    train = Train(
        steps=5,
        lr=0.1,
        optimizer="sgd",
        clip_norm=None,
        batch_size=1,
        schedule=Schedule(kind="linear", by="step", warmup=0.2),
    )
    rounds = 3
    found = play(Scaffold(train=train), two, rounds)
    x, c, own = 0.0, 0.0, {"a": 0.0, "b": 0.0}
    for number in range(1, rounds + 1):
        moves, changes = [], []
        for client, (h, b) in {"a": (1.0, 0.0), "b": (5.0, 1.0)}.items():
            y, total = x, 0.0
            for step in range(5):
                rate = train.rate(number, rounds, step, 5)
                y, total = y - rate * (h * (y - b) - own[client] + c), total + rate
            new = own[client] - c + (x - y) / total
            moves.append(y - x)
            changes.append(new - own[client])
            own[client] = new
        x, c = x + sum(moves) / 2, c + sum(changes) / 2
        assert found.states[number].params["w"].item() == pytest.approx(x, abs=1e-5)
        assert found.states[number].memory["control"]["w"].item() == pytest.approx(c, abs=1e-4)
    assert found.private("b")["control"]["w"].item() == pytest.approx(own["b"], abs=1e-4)


def test_option_one_is_the_full_gradient_at_what_was_received(play: Any, people: Any, net: Any) -> None:
    found = play(Scaffold(train=Train(steps=3, lr=0.01), option="I"), people, 1, **net)
    for client in people:
        leaves = {n: t.clone().requires_grad_() for n, t in net["start"].items()}
        rows = [torch.tensor(row) for row in people[client]]
        (net["loss"](leaves, rows) / len(rows)).backward()
        own = found.private(client)["control"]
        assert all(torch.allclose(own[n], leaves[n].grad, atol=1e-5) for n in leaves)  # type: ignore[arg-type]


def test_the_server_step_size(play: Any, people: Any, net: Any) -> None:
    whole = play(Scaffold(train=PLAIN), people, 1, **net)
    half = play(Scaffold(train=PLAIN, server_lr=0.5), people, 1, **net)
    for name, start in net["start"].items():
        assert torch.allclose(2 * (half.state.params[name] - start), whole.state.params[name] - start, atol=1e-6)
        assert torch.equal(half.state.memory["control"][name], whole.state.memory["control"][name])


@pytest.mark.parametrize(
    "train",
    [
        Train(),
        Train(optimizer="sgd"),
        Train(optimizer="sgd", clip_norm=1.0),
        Train(optimizer="sgd", clip_norm=None, momentum=0.5),
        Train(optimizer="sgd", clip_norm=None, weight_decay=0.1),
        Train(optimizer="adamw", clip_norm=None),
    ],
)
def test_option_two_needs_plain_sgd(train: Train) -> None:
    with pytest.raises(ConfigError, match=r"option II .* plain SGD\. Given: optimizer=.* method\.option=I"):
        Scaffold(train=train)
    assert Scaffold(train=train, option="I").option == "I"


def test_the_defaults_work() -> None:
    method = Scaffold()
    assert (method.option, method.weighting, method.server_lr) == ("II", "uniform", 1.0)
    assert method.reducer == {"update": Mean("uniform"), "control": Mean("uniform")}
    assert Scaffold(weighting="examples").reducer == {"update": Mean("examples"), "control": Mean("uniform")}
    assert method.linear()


def test_what_travels_is_twice_fedavg_and_never_a_private_control(play: Any, people: Any, net: Any) -> None:
    """The bodies of all uploads of a second round are searched for the bytes of every c_k."""
    method, seen = Scaffold(train=PLAIN), []
    played = play(method, people, 1, **net)
    answer = played.worker.answer

    def listening(requests: Any) -> Any:
        for reply in answer(requests):
            seen.append(reply.body)
            yield reply

    played.worker.answer = listening
    asyncio.run(play_round(method, played.state, played.server, 4))
    assert len(seen) == 4
    secrets = {c: played.private(c)["control"] for c in people}
    for body in seen:
        assert set(decode(body).parts) == {"update", "control"}
        assert not any(t.numpy().tobytes() in body for own in secrets.values() for t in own.values())
    plain = play(FedAvg(train=PLAIN), people, 1, **net)
    up = played.server.meter.bytes
    assert up["work/up/update"] + up["work/up/control"] == 2 * 2 * plain.server.meter.bytes["work/up/update"]


class Poisoned(Scaffold):
    """Client q sends what no server should take."""

    card = Scaffold.card
    how: str = "nan"
    """What is wrong with its upload."""

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """As SCAFFOLD, but for q in the second round."""
        upload = await super().work(client, received)
        if client.id != "q" or client.round != 2:
            return upload
        if self.how == "nan":
            upload.update["w"][0, 0] = float("nan")
        elif self.how == "shape":
            upload.parts["control"].tensors["b"] = torch.zeros(1)  # type: ignore[attr-defined]
        elif self.how == "raise":
            raise ValueError("out of luck")
        return upload


@pytest.mark.parametrize(("how", "where"), [("nan", "rejected"), ("shape", "rejected"), ("raise", "lost")])
def test_a_bad_client_is_as_if_it_had_not_been_asked(
    play: Any, people: Any, net: Any, same: Any, how: str, where: str
) -> None:
    """The others are renormalised, and its own control rolls back to what it was before the round."""
    cohorts = [sorted(people), sorted(people)]
    poisoned = play(Poisoned(train=PLAIN, how=how, weighting="examples"), people, 2, cohorts=cohorts, **net)
    record = poisoned.records[1]
    assert [entry["client"] for entry in getattr(record, where)] == ["q"]
    assert (record.used, record.failed) == (3, None)
    clean = play(
        Scaffold(train=PLAIN, weighting="examples"),
        people,
        2,
        cohorts=[sorted(people), sorted(set(people) - {"q"})],
        **net,
    )
    assert same(poisoned.state, clean.state)
    for client in people:
        mine, theirs = poisoned.private(client)["control"], clean.private(client)["control"]
        assert all(torch.equal(mine[n], theirs[n]) for n in mine)
