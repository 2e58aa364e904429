"""FedMD - whose rows, in what order; what travels; one party teaches itself nothing; nobody carries the mean away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.blocks.distil import aligned
from fedllm.core.errors import RoundFailed
from fedllm.core.message import Received, Upload
from fedllm.core.method import on_client
from fedllm.core.server import Reply
from fedllm.core.train import Train
from fedllm.core.wire import decode
from fedllm.core.work import Client
from fedllm.effects.fedmd import parties
from fedllm.effects.mlp_rig import Mlp, Play, logits
from fedllm.methods.directions.fedmd import FedMD
from fedllm.models.adapters.settings import AdapterSettings
from fedllm.models.toy import toy_model
from fedllm.tasks.learner import TransformerLearner
from fedllm.tasks.settings import TaskSettings

STEP = {"optimizer": "sgd", "clip_norm": None, "lr": 0.05, "batch_size": 10}
SHORT: dict[str, Any] = {
    "transfer": {"epochs": 1, **STEP},
    "own": {"epochs": 1, **STEP},
    "train": {"steps": 3, **STEP},
    "digest": {"epochs": 1, **STEP},
    "subset": 25,
}
WIDTHS = {"p0": (16,), "p1": (64,), "p2": (32, 16)}


@pytest.fixture(scope="module")
def ground() -> Any:
    clients, public = parties(0)
    return {client: clients[client] for client in WIDTHS}, public[:60]


def start(ground: Any, kind: type[FedMD] = FedMD, rounds: int = 4, **options: Any) -> Play:
    clients, public = ground
    nets = {client: Mlp(WIDTHS[client], 1) for client in clients}
    return Play(kind(**{**SHORT, **options}), nets, clients, public, rounds=rounds)


def scored(play: Play, client: str, number: int, ground: Any) -> torch.Tensor:
    """What a client's model of now says of alignment subset `number`."""
    rows = aligned(ground[1], play.state.numbers["seed"], number, play.method.subset)  # type: ignore[attr-defined]
    return logits(play.kept(client)["model"], torch.tensor([row["x"][:64] for row in rows]))


def consensus(play: Play) -> torch.Tensor:
    (found,) = play.state.memory["consensus"].values()
    return found


EVENTS: list[dict[str, Any]] = []


class Recorded(FedMD, abstract=True):
    """Keeps what every party did, in order."""

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """As FedMD's, with a client that writes down what it asks."""
        return await super().work(Spy(client), received)  # type: ignore[arg-type]


class Spy:
    def __init__(self, client: Client) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    async def fit(self, start: Any, train: Train, **options: Any) -> Any:
        report = await self.client.fit(start, train, **options)
        what = "digest" if options.get("loss") else "public" if options.get("rows") else "own"
        EVENTS.append({"what": what, "client": self.client.id, "round": self.client.round, "report": report, **options})
        return report

    async def outputs(self, params: Any, rows: Any) -> Any:
        EVENTS.append({"what": "score", "client": self.client.id, "round": self.client.round, "rows": rows})
        return await self.client.outputs(params, rows)


def recorded(ground: Any, rounds: int, client: str = "p2", **options: Any) -> tuple[Play, list[dict[str, Any]]]:
    EVENTS.clear()
    play = start(ground, Recorded, **options).rounds(rounds)
    return play, [event for event in EVENTS if event["client"] == client]


def test_the_order_of_steps_is_the_papers(ground: Any) -> None:
    """Transfer start and scores; then digest of what was scored last, revisit, scores."""
    play, events = recorded(ground, 3)
    assert [e["what"] for e in events] == ["public", "own", "score", *["digest", "own", "score"] * 2]
    public, _, first, digest, _, second, again, *_ = events
    assert len(public["rows"]) == 60 and public.get("targets") is None, "all public rows, with their labels"
    assert digest["rows"] == first["rows"] and again["rows"] == second["rows"] and digest["loss"] == "mae"
    assert first["rows"] != second["rows"] and len(first["rows"]) == 25
    assert first["rows"] == aligned(ground[1], play.state.numbers["seed"], 1, 25)


def test_parties_score_the_same_rows_and_learn_the_mean_of_their_logits(ground: Any) -> None:
    play, _ = recorded(ground, 1)
    mean = sum(scored(play, client, 1, ground) for client in WIDTHS) / 3
    assert torch.allclose(consensus(play), mean, atol=1e-5)
    assert (play.state.numbers["scored"], play.state.numbers["parties"]) == (1, 3)
    play.rounds(1)
    targets = [torch.stack(list(e["targets"])) for e in EVENTS if e["what"] == "digest"]
    assert len(targets) == 3 and all(torch.allclose(found, mean, atol=1e-5) for found in targets)


def test_what_travels_does_not_depend_on_the_model(ground: Any) -> None:
    play = start(ground)
    answer, uploads = play.worker.answer, []

    def listening(requests: Any) -> Any:
        for reply in answer(requests):
            uploads.append((reply.client, decode(reply.body)))
            yield reply

    play.worker.answer = listening  # type: ignore[method-assign]
    play.rounds(2)
    sent = [upload for client, upload in uploads if client != "server"]
    assert len(sent) == 6
    for upload in sent:
        assert list(upload.parts) == ["logits"]
        assert [tuple(t.shape) for t in upload["logits"].values()] == [(25, 10)]
    assert play.server.meter.bytes["work/up/logits"] == 6 * 25 * 10 * 4
    assert not play.state.params


def test_one_party_learns_nothing_from_itself(ground: Any) -> None:
    """Its digest begins at the loss 0."""
    alone = {"p2": ground[0]["p2"]}, ground[1]
    one = {"epochs": 1, **STEP, "batch_size": 25}
    _, events = recorded(alone, 2, digest=one)
    digest = next(event for event in events if event["what"] == "digest")
    loss, n = digest["report"].loss
    assert loss / n < 1e-6 and n == 25


def test_the_optimisers_go_on_and_know_only_their_own_loss(ground: Any) -> None:
    adam = {"optimizer": "adamw", "lr": 1e-3, "batch_size": 10}
    options = {"train": {"steps": 3, **adam}, "digest": {"epochs": 1, **adam}}
    play, events = recorded(ground, 3, **options)
    digests = [e for e in events if e["what"] == "digest"]
    revisits = [e for e in events if e["what"] == "own"][1:]
    assert [float(e["report"].moments["step"]) for e in digests] == [3.0, 6.0]
    assert [float(e["report"].moments["step"]) for e in revisits] == [3.0, 6.0]
    kept = play.kept("p2")
    assert all(torch.equal(kept["digest"][n], t) for n, t in digests[-1]["report"].moments.items())
    assert all(torch.equal(kept["revisit"][n], t) for n, t in revisits[-1]["report"].moments.items())


def test_a_mean_of_logits_is_not_a_mean_of_probabilities(ground: Any) -> None:
    play = start(ground).rounds(1)
    shares = sum(scored(play, client, 1, ground).softmax(-1) for client in WIDTHS) / 3
    assert not torch.allclose(consensus(play).softmax(-1), shares, atol=1e-3)


class Faulty(FedMD, abstract=True):
    """p1 misbehaves."""

    how: str = "absent"

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """As FedMD's; then something goes wrong at p1."""
        upload = await super().work(client, received)
        if client.id == "p1" and client.round == 2:
            (name,) = upload["logits"]
            found = upload["logits"]
            if self.how == "absent":
                raise OSError("gone")
            if self.how == "nan":
                found[name][3, 3] = float("nan")
            elif self.how == "short":
                found[name] = found[name][:7].clone()
            elif self.how == "classes":
                found[name] = found[name][:, :9].clone()
            elif self.how == "other rows":
                found["0" * 16] = found.pop(name)
            elif self.how == "huge":
                found[name] = found[name] + 1e9
        return upload


@pytest.mark.parametrize("how", ["absent", "nan", "short", "classes", "other rows"])
def test_the_mean_is_over_those_whose_scores_can_be_used(ground: Any, how: str) -> None:
    play = start(ground, Faulty, how=how).rounds(1)
    before = play.kept("p1")["model"]
    play.rounds(1)
    record = play.records[-1]
    named = [entry["client"] for entry in (record.lost if how == "absent" else record.rejected)]
    assert named == ["p1"] and record.used == 2 and play.state.numbers["parties"] == 2
    mean = (scored(play, "p0", 2, ground) + scored(play, "p2", 2, ground)) / 2
    assert torch.allclose(consensus(play), mean, atol=1e-5)
    after = play.kept("p1")["model"]
    assert all(torch.equal(before[n], after[n]) for n in before), "it goes on from where it was"
    assert play.rounds(1).records[-1].used == 3


def test_no_party_carries_the_mean_away(ground: Any) -> None:
    play = start(ground, Faulty, how="huge", limit=2.0).rounds(2)
    rest = sum(scored(play, client, 2, ground).clamp(-2, 2) for client in ("p0", "p2"))
    assert torch.allclose(consensus(play), (rest + 2.0) / 3, atol=1e-5)


def test_a_late_party_has_its_transfer_start_first(ground: Any) -> None:
    EVENTS.clear()

    class Late(Recorded, abstract=True):
        def cohort(self, round: int, clients: Any, size: int, rng: Any) -> list[str]:
            return ["p0", "p1"] if round == 1 else list(clients)

    start(ground, Late).rounds(2)
    assert [e["what"] for e in EVENTS if e["client"] == "p2"] == ["public", "own", "score"]
    assert [e["what"] for e in EVENTS if e["client"] == "p0"][3:] == ["digest", "own", "score"]


def test_after_a_failed_round_the_older_consensus_is_learnt(ground: Any) -> None:
    play = start(ground, Recorded).rounds(1)
    ask = play.server.engine.ask

    async def unplugged(requests: Any, deadline: Any) -> Any:
        for request in requests:
            yield Reply(request.id, request.client, None, "unplugged")

    play.server.engine.ask = unplugged  # type: ignore[method-assign]
    before = consensus(play)
    play.rounds(1)
    assert play.records[-1].failed and torch.equal(consensus(play), before) and play.state.numbers["scored"] == 1
    play.server.engine.ask = ask  # type: ignore[method-assign]
    EVENTS.clear()
    play.rounds(1)
    digest = next(e for e in EVENTS if e["what"] == "digest")
    assert digest["rows"] == aligned(ground[1], play.state.numbers["seed"], 1, 25)
    assert play.state.numbers["scored"] == 3


def test_other_public_rows_are_refused_at_the_party(ground: Any) -> None:
    play = start(ground)
    read = play.worker.read

    def swapped(client: str, split: str) -> Any:
        rows = read(client, split)
        return [rows[1], rows[0], *rows[2:]] if client == "p1" and split == "public" else rows

    play.worker.read = swapped  # type: ignore[method-assign]
    record = play.rounds(1).records[0]
    assert record.used == 2 and "not the server's" in record.lost[0]["reason"]


def test_the_student_is_the_servers_and_learns_the_mean(ground: Any) -> None:
    longer = {"digest": {"epochs": 10, **STEP}}
    play = start(ground, student=True, **longer).rounds(1)
    first, gaps = Mlp(WIDTHS["p0"], 1).initial(), []
    assert play.state.params.keys() == first.keys()
    assert any(not torch.equal(play.state.params[n], first[n]) for n in first)
    rows = aligned(ground[1], play.state.numbers["seed"], 1, 25)
    x = torch.tensor([row["x"][:64] for row in rows])
    for params in (first, play.state.params):
        soft = consensus(play).softmax(-1)
        gaps.append(float((soft * (soft.log() - logits(params, x).log_softmax(-1))).sum(-1).mean()))
    assert gaps[1] < gaps[0] / 2
    plain = start(ground, **longer).rounds(1)
    assert torch.equal(consensus(plain), consensus(play)), "parties do not notice"


def test_a_subset_larger_than_the_public_rows_is_all_of_them(ground: Any) -> None:
    play = start(ground, subset=5000).rounds(1)
    assert consensus(play).shape == (60, 10)


def test_no_public_rows_are_refused(ground: Any) -> None:
    with pytest.raises(RoundFailed, match=r"describe.*no public rows.*data\.public"):
        start((ground[0], [])).rounds(1)


def test_a_language_model_is_refused() -> None:
    learner: Any = TransformerLearner(
        toy_model("llama", kind="causal-lm"), TaskSettings(template="plain", max_length=32), AdapterSettings(rank=2)
    )
    rows = [{"instruction": "say", "response": "yes"}]
    play = Play(FedMD(**SHORT), {"a": learner}, {"a": {"train": rows, "eval": rows}}, rows)
    with pytest.raises(RoundFailed, match="Class scores are one vector per row"):
        play.rounds(1)
    assert FedMD.card.models == ("sequence-classification",)


@pytest.mark.parametrize("options", [{"limit": 0}, {"subset": 0}])
def test_values_out_of_range_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="greater"):
        FedMD(**options)
