"""Decentralised gossip - invariants through the real engine: mean, FedAvg, CHOCO, push-sum, rings, churn, failures."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, FedLLMError, RoundFailed
from fedllm.core.message import Upload
from fedllm.core.server import Reply, Server
from fedllm.core.state import State
from fedllm.core.wire import decode, encode
from fedllm.data.federation import Federation
from fedllm.effects.rig import Play
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.protocols.decentralized_gossip import DecentralizedGossip
from fedllm.tasks.function import FunctionLearner
from tests.contract.conftest import Watched

TRAIN = {"steps": 3, "lr": 0.1, "optimizer": "sgd", "clip_norm": None, "batch_size": 1}
FLAT = {"steps": 1, "lr": 0.1, "optimizer": "sgd"}
P = 12
ALGORITHMS: list[dict[str, Any]] = [
    {},
    {"graph": "pairs"},
    {"algorithm": "push-sum", "graph": "directed-exponential"},
    {"algorithm": "choco", "compressor": "quantise"},
    {"algorithm": "choco", "fraction": 0.25},
    {"algorithm": "ring"},
    {"algorithm": "moshpit"},
]
every_algorithm = pytest.mark.parametrize(
    "options", ALGORITHMS, ids=lambda o: "-".join(map(str, o.values())) or "d-psgd"
)


class Peers:
    """Peers with a model of P numbers in float64: each pulls towards its own target, or not at all (`flat`)."""

    def __init__(
        self, n: int = 6, rounds: int = 4, flat: bool = False, width: int | None = None, **options: Any
    ) -> None:
        def loss(params: Any, examples: Any) -> torch.Tensor:
            if flat:
                return params["x"].sum() * 0.0
            return sum(((params["x"] - x).square().sum() / 2 for x in examples), torch.zeros(()))

        self.learner = FunctionLearner(loss, {"x": torch.zeros(P, dtype=torch.float64)})
        self.ids = [f"c{i}" for i in range(n)]
        draw = torch.Generator().manual_seed(5)
        self.rows = {c: [{"x": torch.randn(P, generator=draw).tolist()}] for c in self.ids}
        self.protocol = DecentralizedGossip.model_validate({"train": FLAT if flat else TRAIN, **options})
        federation = Federation.of({c: {"train": rows, "eval": rows} for c, rows in self.rows.items()})
        self.worker = LocalWorker(self.learner, self.protocol, federation, 0)
        self.engine = Watched(LocalEngine(self.worker, self.ids, width or n))
        self.server = Server(self.engine, 0, rounds=rounds)
        if flat:
            self.set(torch.randn(n, P, generator=draw, dtype=torch.float64))

    def set(self, values: torch.Tensor) -> None:
        for client, value in zip(self.ids, values, strict=True):
            self.worker.private.open(client)["x"] = {"x": value}
        self.worker.private.settle(self.ids)

    def play(self) -> tuple[State, Any]:
        return asyncio.run(self.protocol.play(self.server, self.protocol.init(self.learner.initial())))

    def kept(self, name: str) -> dict[str, Any]:
        found = {c: dict(self.worker.private.open(c)).get(name) for c in self.ids}
        self.worker.private.settle([])
        return found

    def models(self) -> torch.Tensor:
        rows = [value["x"] if value else torch.zeros(P, dtype=torch.float64) for value in self.kept("x").values()]
        return torch.stack(rows)

    def lose(self, client: str, round: int, at: int, spoil: Any = None) -> None:
        """In a round the client's reply number `at` (from 0) does not arrive, or arrives as `spoil` makes it."""
        seen = {"n": 0}

        def change(reply: Reply) -> Reply:
            if reply.client != client or self.server.round != round or "evaluate" in reply.id:
                return reply
            seen["n"] += 1
            if seen["n"] != at + 1:
                return reply
            if spoil is None:
                if reply.session is not None:
                    self.worker.close([reply.session])
                else:
                    self.worker.private.drop(client)
                return dataclasses.replace(reply, body=None, error="unplugged", session=None)
            upload = decode(reply.body or b"")
            assert isinstance(upload, Upload)
            return dataclasses.replace(reply, body=encode(spoil(upload)))

        self.engine.change = change


def spread(values: torch.Tensor) -> float:
    return float((values - values.mean(0)).norm())


# -- invariants of the card ------------------------------------------------------------------------------------------


@every_algorithm
def test_mixing_keeps_the_mean_and_brings_peers_together(options: dict[str, Any]) -> None:
    peers = Peers(8, rounds=30, flat=True, **options)
    before = peers.models()
    peers.play()
    after, masses = peers.models(), [w or 1.0 for w in peers.kept("w").values()]
    assert torch.allclose(after.mean(0), before.mean(0), atol=1e-12, rtol=0)
    models = after / torch.tensor(masses, dtype=torch.float64)[:, None]
    assert spread(models) < 0.4 * spread(before)
    assert sum(masses) == pytest.approx(8, abs=1e-12)


@every_algorithm
@pytest.mark.parametrize("churn", [0.25, 0.6])
def test_mixing_keeps_the_mean_while_peers_are_down(options: dict[str, Any], churn: float) -> None:
    peers = Peers(8, rounds=20, flat=True, churn=churn, **options)
    before = peers.models()
    _, report = peers.play()
    assert torch.allclose(peers.models().mean(0), before.mean(0), atol=1e-12, rtol=0)
    assert {entry["peers"] for entry in report["rounds"]} == {8 - round(churn * 8)}
    assert sum(w or 1.0 for w in peers.kept("w").values()) == pytest.approx(8, abs=1e-12)


@pytest.mark.parametrize("options", [{"graph": "complete"}, {"algorithm": "ring"}, {"algorithm": "moshpit", "dims": 1}])
def test_an_exact_mean_is_fedavg_with_equal_weights(options: dict[str, Any]) -> None:
    peers = Peers(5, rounds=3, **options)
    state, report = peers.play()
    fedavg = Play(FedAvg.model_validate({"train": TRAIN, "weighting": "uniform"}), peers.learner, peers.rows, rounds=3)
    expected = fedavg.rounds(3).params["x"]
    assert all(torch.allclose(model, expected, atol=1e-12) for model in peers.models())
    assert torch.allclose(state.params["x"], expected, atol=1e-12) and report["spread"] < 1e-12


def test_choco_with_identity_and_gamma_one_is_plain_gossip() -> None:
    compressed, plain = Peers(algorithm="choco", compressor="identity", gamma=1.0), Peers()
    compressed.play(), plain.play()
    assert torch.allclose(compressed.models(), plain.models(), atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_bytes_of_a_ring(n: int) -> None:
    peers = Peers(n, rounds=2, algorithm="ring")
    _, report = peers.play()
    up = sum(size for name, size in peers.server.meter.bytes.items() if name == "work/up/message")
    assert up == 2 * n * 2 * (n - 1) * P * 8 // n == report["edge_bytes"]


@pytest.mark.parametrize(("graph", "edges"), [("ring", 12), ("complete", 30), ("star", 10)])
def test_every_message_counts_once_for_each_edge(graph: str, edges: int) -> None:
    _, report = Peers(6, rounds=3, graph=graph).play()
    assert report["edge_bytes"] == 3 * edges * P * 8
    meter = Peers(6, rounds=3, graph=graph)
    _, found = meter.play()
    assert found["relay_bytes"] == sum(
        len(m.body) for m in (*meter.engine.requests, *meter.engine.replies) if "-work-" in m.id
    )


def test_d_psgd_is_local_steps_times_the_matrix() -> None:
    from fedllm.blocks.topology import metropolis, ring

    peers, now = Peers(rounds=3), torch.zeros(6, P, dtype=torch.float64)
    peers.play()
    targets = torch.stack([torch.tensor(rows[0]["x"]) for rows in peers.rows.values()]).double()
    for _ in range(3):
        for _ in range(3):
            now = now - 0.1 * (now - targets)
        now = torch.from_numpy(metropolis(ring(6))) @ now
    assert torch.allclose(peers.models(), now, atol=1e-12)


def test_moshpit_on_a_full_grid_agrees_after_as_many_rounds_as_axes() -> None:
    peers = Peers(8, rounds=3, flat=True, algorithm="moshpit", dims=3)
    before = peers.models()
    peers.play()
    assert torch.allclose(peers.models(), before.mean(0).expand(8, P), atol=1e-12)


# -- one, two, many; the same bits -----------------------------------------------------------------------------------


@every_algorithm
def test_one_peer_trains_alone(options: dict[str, Any]) -> None:
    peers, alone = Peers(1, **options), Peers(1)
    peers.play(), alone.play()
    assert torch.allclose(peers.models(), alone.models(), atol=1e-12) and spread(peers.models()) == 0
    assert float(peers.models().abs().max()) > 0.1


def test_two_peers_meet_in_the_middle() -> None:
    peers = Peers(2, rounds=1, flat=True)
    before = peers.models()
    _, report = peers.play()
    assert torch.allclose(peers.models(), before.mean(0).expand(2, P), atol=1e-12)
    assert report["edge_bytes"] == 2 * P * 8


@every_algorithm
def test_width_changes_nothing_and_resuming_gives_the_same_bits(options: dict[str, Any]) -> None:
    whole, one = Peers(rounds=4, churn=0.3, **options), Peers(rounds=4, churn=0.3, width=1, **options)
    (state, report), (again, _) = whole.play(), one.play()
    assert torch.equal(whole.models(), one.models()) and torch.equal(state.params["x"], again.params["x"])

    cut, kept = Peers(rounds=4, churn=0.3, **options), []

    def stop(state: State) -> None:
        kept.append(state)
        if state.round == 2:
            raise KeyboardInterrupt

    cut.server.keep = stop
    with pytest.raises(KeyboardInterrupt):
        cut.play()
    cut.server.keep = lambda state: None
    resumed, told = asyncio.run(cut.protocol.play(cut.server, kept[-1]))
    assert torch.equal(cut.models(), whole.models()) and resumed.numbers == state.numbers
    assert told["rounds"] == report["rounds"] and told["peers"] == report["peers"]


def test_the_report_has_peers_worst_spread_and_average() -> None:
    peers = Peers(rounds=2)
    state, report = peers.play()
    loss = report["peers"]["loss"]
    assert loss["least"] < loss["mean"] < loss["most"] and loss["deviation"] > 0 and loss["worst"] in peers.ids
    values = peers.models()
    assert torch.allclose(state.params["x"], values.mean(0), atol=1e-12)
    distance = (values - values.mean(0)).square().sum(1).mean().sqrt() / values.mean(0).norm()
    assert report["spread"] == pytest.approx(float(distance), rel=1e-9)
    assert report["averaged"]["loss"]["mean"] > 0 and len(report["rounds"]) == 2


def test_without_average_no_model_is_collected() -> None:
    peers = Peers(rounds=2, average=False)
    state, report = peers.play()
    assert state.params == {} and "averaged" not in report and "spread" not in report
    assert not any("lend" in reply.id for reply in peers.engine.replies)


# -- failures --------------------------------------------------------------------------------------------------------


@every_algorithm
@pytest.mark.parametrize("at", [0, 1])
def test_a_peer_that_fails_is_out_of_the_round_and_comes_back(options: dict[str, Any], at: int) -> None:
    peers = Peers(8, rounds=12, flat=True, **options)
    peers.lose("c3", 2, at)
    before = peers.models()
    _, report = peers.play()
    assert report["rounds"][1]["lost"] == 1 and report["rounds"][1]["peers"] == 7
    assert report["rounds"][2]["peers"] == 8 and report["rounds"][2]["lost"] == 0
    late = at == 1 and options.get("algorithm", "d-psgd") in ("d-psgd", "push-sum")
    if not late:  # gossip already counted on a peer that fails after it was heard: the mean may move
        assert torch.allclose(peers.models().mean(0), before.mean(0), atol=1e-12, rtol=0)


@every_algorithm
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_reaches_nobody(options: dict[str, Any], value: float) -> None:
    peers = Peers(8, rounds=3, **options)
    steps = {"choco": 1, "ring": 1, "moshpit": 1}.get(options.get("algorithm", ""), 0)

    def poison(upload: Upload) -> Upload:
        tensors = upload["message"]
        name = next(n for n, t in tensors.items() if t.is_floating_point())
        tensors[name] = torch.full_like(tensors[name], value)
        return upload

    peers.lose("c1", 2, steps, poison)
    _, report = peers.play()
    assert bool(torch.isfinite(peers.models()).all())
    assert report["rounds"][1]["rejected"] == 1 and report["rounds"][1]["peers"] == 7


@pytest.mark.parametrize("options", ALGORITHMS[:5])
def test_a_message_of_wrong_shape_is_refused_by_its_readers(options: dict[str, Any]) -> None:
    peers = Peers(6, rounds=3, flat=True, **options)

    def wrong(upload: Upload) -> Upload:
        tensors = upload["message"]
        for name in tensors:
            tensors[name] = torch.cat([tensors[name], tensors[name]])
        return upload

    peers.lose("c1", 2, 1 if options.get("algorithm") == "choco" else 0, wrong)
    _, report = peers.play()
    refused = report["rounds"][1]["refused"]
    assert refused and all(names == ["c1"] for names in refused.values()) and "c1" not in refused
    assert report["rounds"][2]["refused"] == {} and bool(torch.isfinite(peers.models()).all())


def test_a_failed_ring_leaves_everybody_what_it_has_and_a_failed_group_only_its_own() -> None:
    ring = Peers(4, rounds=1, flat=True, algorithm="ring")
    before = ring.models()
    ring.lose("c2", 1, 2)
    ring.play()
    assert torch.equal(ring.models(), before)
    grid = Peers(4, rounds=1, flat=True, algorithm="moshpit")  # groups c0 c1 and c2 c3
    before = grid.models()
    grid.lose("c2", 1, 1)
    grid.play()
    after = grid.models()
    assert torch.equal(after[2:], before[2:]) and torch.allclose(after[0], before[:2].mean(0), atol=1e-12)


def test_choco_sends_whole_copies_to_those_who_missed_a_message_and_only_to_them() -> None:
    peers = Peers(6, rounds=5, flat=True, algorithm="choco", fraction=0.25)
    peers.lose("c3", 2, 0)
    peers.play()
    # c2 and c4 went on without c3 in round 2, so both send it the whole in round 3; c3 changed nothing meanwhile
    whole = [(r.id.split("-")[0], r.client) for r in peers.engine.replies if b"whole/" in (r.body or b"")]
    assert whole == [("3", "c2"), ("3", "c4")]
    copies, tags = peers.kept("copies"), peers.kept("tags")
    for i, client in enumerate(peers.ids):
        for j in ((i - 1) % 6, (i + 1) % 6):
            name = f"c{j}\x1fx"
            assert torch.equal(copies[client][name], copies[f"c{j}"][name]) and tags[client][f"c{j}"] == 5


def test_a_lent_model_of_wrong_shape_is_left_out_of_the_average() -> None:
    peers = Peers(4, rounds=1, flat=True)

    def change(reply: Reply) -> Reply:
        if "-lend-c2-" not in reply.id:
            return reply
        return dataclasses.replace(reply, body=encode(Upload(None, model={"x": torch.zeros(3)})))

    peers.engine.change = change
    state, _ = peers.play()
    kept = peers.models()[[0, 1, 3]]
    assert torch.allclose(state.params["x"], kept.mean(0), atol=1e-12) and len(peers.server.rejected) == 1


def test_a_round_without_anybody_ends_the_run() -> None:
    peers = Peers(3, rounds=3)
    peers.engine.change = lambda reply: dataclasses.replace(reply, body=None, error="unplugged", session=None)
    with pytest.raises(RoundFailed, match=r"round 1.*unplugged.*resume"):
        peers.play()


# -- options that cannot be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"graph": "directed-ring"}, "both.*'ring'.*push-sum"),
        ({"algorithm": "choco", "graph": "pairs"}, "copies"),
        ({"gamma": 0.5}, "gamma=0.5 means nothing for algorithm=d-psgd.*choco"),
        ({"compressor": "sign"}, "compressor=sign"),
        ({"algorithm": "ring", "graph": "star"}, "graph=star"),
        ({"dims": 3}, "moshpit"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=word):
        DecentralizedGossip.model_validate(options)


@pytest.mark.parametrize(
    "options", [{"churn": 1.0}, {"churn": -0.1}, {"gamma": 0.0}, {"fraction": 0.0}, {"bits": 3}, {"dims": 0}]
)
def test_values_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        DecentralizedGossip.model_validate(options)


@pytest.mark.parametrize(("options", "n"), [({"graph": "torus"}, 7), ({"graph": "erdos-renyi", "edge_share": 0.01}, 6)])
def test_a_graph_that_cannot_be_is_refused_before_any_training(options: dict[str, Any], n: int) -> None:
    peers = Peers(n, **options)
    with pytest.raises(FedLLMError):
        peers.play()
    assert not peers.engine.requests
