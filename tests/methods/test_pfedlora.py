"""pFedLoRA - which half moves when, what travels from clients of different models, and where it is local training."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError
from fedllm.core.message import Dense, Received, Upload
from fedllm.core.method import on_client
from fedllm.core.train import Train
from fedllm.core.wire import decode
from fedllm.core.work import Client
from fedllm.effects.mlp_rig import Mlp, Play, logits
from fedllm.effects.pfedlora import skewed
from fedllm.engine.rounds import play_round
from fedllm.methods.baseline.local import Local
from fedllm.methods.model_heterogeneity.pfedlora import A, B, PFedLoRA

TRAIN = Train(steps=4, lr=0.05, optimizer="sgd", momentum=0.9, clip_norm=None, batch_size=10)
WIDTHS = {"c0": (16,), "c1": (64,), "c2": (32, 16)}
RANK, WIDTH = 3, 64


@pytest.fixture(scope="module")
def people() -> Any:
    return {client: rows for client, rows in skewed(0, 0.5).items() if client in WIDTHS}


def start(people: Any, kind: type[PFedLoRA] = PFedLoRA, rounds: int = 3, **options: Any) -> Play:
    nets = {client: Mlp(WIDTHS[client], 1, bridge=(RANK, WIDTH)) for client in people}
    method = kind(**{"train": TRAIN, "rank": RANK, "width": WIDTH, **options})
    return Play(method, nets, people, rounds=rounds)


FITS: list[dict[str, Any]] = []


class Recorded(PFedLoRA, abstract=True):
    """Keeps what every fit began with, held still and gave."""

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """As pFedLoRA's, with a client that writes down its fits."""
        return await super().work(Spy(client), received)  # type: ignore[arg-type]


class Spy:
    def __init__(self, client: Client) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    async def fit(self, start: Any, train: Train, **options: Any) -> Any:
        held = {n: t.clone() for n, t in options["fixed"].items()}
        report = await self.client.fit(start, train, **options)
        assert all(torch.equal(t, options["fixed"][n]) for n, t in held.items()), "what is fixed does not move"
        FITS.append({"client": self.client.id, "start": start, "train": train, "report": report, **options})
        return report


def test_the_model_and_the_bridge_take_turns(people: Any) -> None:
    FITS.clear()
    play = start(people, Recorded).rounds(2)
    fits = [fit for fit in FITS if fit["client"] == "c2"]
    assert len(fits) == 4
    for model, bridge in (fits[:2], fits[2:]):
        assert set(model["fixed"]) == {A, B} == set(bridge["start"]) and not {A, B} & set(model["start"])
        (plain, zero), (full, nothing) = model["terms"]
        assert (plain, full, nothing) == (0.5, 0.5, {}) and set(zero) == {B} and not zero[B].any()
        assert bridge.get("terms") is None
        assert all(torch.equal(model["report"].params[n], bridge["fixed"][n]) for n in bridge["fixed"])
    assert all(torch.equal(fits[3]["fixed"][n], t) for n, t in play.kept("c2")["model"].items())


def test_what_travels_is_the_bridge_whatever_the_model(people: Any) -> None:
    play = start(people).rounds(1)
    answer, uploads = play.worker.answer, []

    def listening(requests: Any) -> Any:
        for reply in answer(requests):
            uploads.append(decode(reply.body))
            yield reply

    play.worker.answer = listening  # type: ignore[method-assign]
    before = play.server.meter.bytes["work/up/update"]
    asyncio.run(play_round(play.method, play.state, play.server, 3))
    for upload in uploads:
        assert list(upload.parts) == ["update"] and isinstance(upload.parts["update"], Dense)
        assert {n: tuple(t.shape) for n, t in upload["update"].items()} == {A: (RANK, WIDTH), B: (10, RANK)}
    assert play.server.meter.bytes["work/up/update"] - before == 3 * 4 * RANK * (WIDTH + 10)


def test_a_model_keeps_its_own_shapes_and_its_map_to_the_common_width(people: Any) -> None:
    play = start(people).rounds(1)
    kept = {client: play.kept(client)["model"] for client in people}
    assert kept["c0"]["bridge.project"].shape == (64, 16) and "bridge.project" not in kept["c1"]
    assert kept["c2"]["1.weight"].shape == (16, 32)
    assert not any({A, B} & set(model) for model in kept.values())
    assert set(play.state.params) == {A, B} and not play.state.memory


def test_a_fresh_bridge_changes_nothing() -> None:
    params = Mlp((16,), 1, bridge=(RANK, WIDTH)).initial()
    x = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(params, x), logits({n: t for n, t in params.items() if n not in (A, B)}, x))


def test_with_mu_0_the_models_train_as_if_alone_to_the_last_bit(people: Any) -> None:
    play = start(people, mu=0.0).rounds(2)
    alone = Play(Local(train=TRAIN), {c: Mlp(w, 1) for c, w in WIDTHS.items()}, people, rounds=3).rounds(2)
    for client in people:
        model, plain = play.kept(client)["model"], alone.kept(client)["params"]
        assert all(torch.equal(model[n], plain[n]) for n in plain)


def test_a_bridge_that_stays_zero_leaves_local_training(people: Any) -> None:
    """With B = 0 both paths are one, whatever mu: the first round's model is that of a client alone."""
    play = start(people).rounds(1)
    alone = Play(Local(train=TRAIN), {c: Mlp(w, 1) for c, w in WIDTHS.items()}, people, rounds=3).rounds(1)
    for client in people:
        model, plain = play.kept(client)["model"], alone.kept(client)["params"]
        assert all(torch.allclose(model[n], plain[n], atol=1e-6) for n in plain)


def test_the_server_weighs_bridges_by_examples(people: Any) -> None:
    FITS.clear()
    uneven = {**people, "c0": {**people["c0"], "train": people["c0"]["train"][:10]}}
    play = start(uneven, Recorded).rounds(1)
    found = {fit["client"]: fit["report"].params for fit in FITS if B in fit["start"]}
    sizes = {client: len(rows["train"]) for client, rows in uneven.items()}
    for name in (A, B):
        mean = sum(sizes[c] * found[c][name] for c in sizes) / sum(sizes.values())
        assert torch.allclose(play.state.params[name], mean, atol=1e-6)


def test_one_client_has_the_servers_bridge(people: Any) -> None:
    FITS.clear()
    play = start({"c0": people["c0"]}, Recorded).rounds(1)
    last = FITS[-1]["report"].params
    assert all(torch.allclose(play.state.params[n], last[n], atol=1e-7) for n in (A, B))


def test_the_bridge_may_train_otherwise(people: Any) -> None:
    FITS.clear()
    start(people, Recorded, bridge_train=TRAIN.model_copy(update={"steps": 7, "lr": 0.01})).rounds(1)
    assert [fit["report"].steps for fit in FITS if fit["client"] == "c0"] == [4, 7]


def test_a_client_is_measured_with_its_own_model(people: Any) -> None:
    play = start(people).rounds(2)
    counts = play.accuracy()
    assert counts == play.accuracy() and set(counts) == set(people)
    x = torch.tensor([row["x"] for row in people["c2"]["eval"]])
    right = logits({**play.kept("c2")["model"], **play.state.params}, x[:, :64]).argmax(1) == x[:, 64]
    assert counts["c2"] == pytest.approx(float(right.float().mean()), abs=1e-6)


class Poisoned(PFedLoRA, abstract=True):
    """c1 sends what no server should take."""

    @on_client
    async def work(self, client: Client, received: Received) -> Upload:
        """As pFedLoRA's, with a hole in it."""
        upload = await super().work(client, received)
        if client.id == "c1":
            upload.update[B][0, 0] = float("nan")
        return upload


def test_a_bridge_that_is_not_finite_is_dropped_and_its_client_keeps_nothing(people: Any) -> None:
    play = start(people, Poisoned).rounds(1)
    assert [entry["client"] for entry in play.records[0].rejected] == ["c1"] and play.records[0].used == 2
    assert "c1" not in play.worker.private.clients()


def test_what_it_asks_of_the_adapter_and_what_may_differ() -> None:
    assert PFedLoRA(rank=2, width=50).adapter() == {"bridge": 2, "bridge_width": 50}
    assert PFedLoRA.mixes == ("models",) and PFedLoRA().linear() and PFedLoRA().weighting == "examples"


def test_a_model_without_a_bridge_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no bridge.*adapter\.bridge=8"):
        PFedLoRA().init(Mlp((16,), 1).initial())


@pytest.mark.parametrize("options", [{"rank": 0}, {"mu": 1.5}, {"mu": -0.1}, {"width": 0}])
def test_values_out_of_range_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=r"greater|less"):
        PFedLoRA(**options)
