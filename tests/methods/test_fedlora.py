"""FedLoRA - what is frozen in each phase, what stays at the client, and where it is FedAvg to the last bit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError, RoundFailed
from fedllm.core.message import Received
from fedllm.core.method import Method, on_client
from fedllm.core.train import Train
from fedllm.core.wire import decode
from fedllm.core.work import Client
from fedllm.effects.fedlora import at_odds
from fedllm.effects.mlp_rig import Mlp, Play, logits
from fedllm.engine.rounds import play_round
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.model_heterogeneity.fedlora import PRIVATE, FedLoRA

TRAIN = Train(steps=5, lr=0.05, optimizer="sgd", momentum=0.9, clip_norm=None, batch_size=10)


@pytest.fixture(scope="module")
def people() -> Any:
    return dict(list(at_odds(0).items())[:3])


def start(method: Method, people: Any, rank: int = 4, rounds: int = 1) -> Play:
    return Play(method, Mlp((16,), 1, personal=rank), people, rounds=rounds)


class Recorded(FedLoRA, abstract=True):
    """Keeps what every fit began with, held still and gave."""

    @on_client
    async def work(self, client: Client, received: Received) -> Any:
        """As FedLoRA's, with a client that writes down its fits."""
        return await super().work(Spy(client), received)  # type: ignore[arg-type]


FITS: list[dict[str, Any]] = []


class Spy:
    def __init__(self, client: Client) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self.client, name)

    async def fit(self, start: Any, train: Train, **options: Any) -> Any:
        held = {n: t.clone() for n, t in (options.get("fixed") or {}).items()}
        report = await self.client.fit(start, train, **options)
        assert all(torch.equal(t, options["fixed"][n]) for n, t in held.items()), "what is fixed does not move"
        FITS.append({"client": self.client.id, "moved": set(start), "train": train, "report": report, **options})
        return report


def recorded(order: str, people: Any, rounds: int = 2, **options: Any) -> tuple[Play, list[dict[str, Any]]]:
    FITS.clear()
    play = start(Recorded(train=TRAIN, order=order, **options), people, rounds=rounds).rounds(rounds)
    return play, [fit for fit in FITS if fit["client"] == "c0"]


@pytest.mark.parametrize("order", ["private-first", "shared-first"])
def test_one_part_moves_while_the_other_is_held_still(people: Any, order: str) -> None:
    _, fits = recorded(order, people)
    private = [all(name.endswith(PRIVATE) for name in fit["moved"]) for fit in fits]
    assert private == ([True, False] if order == "private-first" else [False, True]) * 2
    assert [fit["train"].steps for fit in fits[:2]] == ([2, 3] if order == "private-first" else [3, 2])
    for fit in fits:
        assert not fit["moved"] & set(fit["fixed"]) and len(fit["moved"] | set(fit["fixed"])) == 8


def test_phases_see_batches_that_follow_each_other(people: Any) -> None:
    _, fits = recorded("private-first", people, 3)
    assert [fit["begun"] for fit in fits] == [0, 2, 5, 7, 10, 12]
    _, fits = recorded("shared-first", people, 2)
    assert [fit["begun"] for fit in fits] == [0, 3, 5, 8]


def test_epochs_are_parted_like_steps(people: Any) -> None:
    FITS.clear()
    train = Train(epochs=5, lr=0.05, optimizer="sgd", clip_norm=None, batch_size=20)
    start(Recorded(train=train), people).rounds(1)
    fits = [fit for fit in FITS if fit["client"] == "c0"]
    assert [(fit["train"].epochs, fit["report"].steps, fit["begun"]) for fit in fits] == [(2, 6, 0), (3, 9, 6)]


def test_the_shared_part_starts_where_the_private_one_ended(people: Any) -> None:
    play, fits = recorded("private-first", people, 1)
    tau = fits[0]["report"].params
    assert all(torch.equal(tau[n], fits[1]["fixed"][n]) for n in tau)
    assert all(torch.equal(tau[n], play.kept("c0")["tau"][n]) for n in tau)
    assert all(tau[n].abs().max() > 0 for n in tau)


def test_the_server_has_nothing_private_and_everybody_gets_the_same(people: Any) -> None:
    play = start(FedLoRA(train=TRAIN), people, rounds=3).rounds(2)
    assert not any("lora" in name for name in play.state.params) and not play.state.memory
    taus = [play.kept(client)["tau"] for client in people]
    assert all(name.endswith(PRIVATE) for name in taus[0])
    assert not torch.equal(taus[0]["0.personal.lora_B"], taus[1]["0.personal.lora_B"])
    answer, bodies, uploads = play.worker.answer, [], []

    def listening(requests: Any) -> Any:
        bodies.extend(request.body for request in requests)
        for reply in answer(requests):
            uploads.append(reply.body)
            yield reply

    play.worker.answer = listening  # type: ignore[method-assign]
    asyncio.run(play_round(play.method, play.state, play.server, 3))
    assert len(set(bodies)) == 1 and len(uploads) == 3
    assert all(set(decode(body)["update"]) == set(play.state.params) for body in uploads)


def test_the_mean_is_uniform_over_those_who_answered(people: Any) -> None:
    uneven = {**people, "c0": {**people["c0"], "train": people["c0"]["train"][:11]}}
    play, _ = recorded("private-first", uneven, 1)
    deltas = [fit["report"].delta for fit in FITS if "0.weight" in fit["moved"]]
    first = Mlp((16,), 1).initial()
    for name, value in play.state.params.items():
        assert torch.allclose(value, first[name] + sum(d[name] for d in deltas) / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "rank"), [({"rank": 0}, 0), ({"share": 0.0}, 4), ({"rank": 0, "order": "together"}, 0)]
)
def test_without_a_private_part_it_is_fedavg_to_the_last_bit(people: Any, options: Any, rank: int) -> None:
    mine = start(FedLoRA(train=TRAIN, **options), people, rank, 2).rounds(2)
    plain = Play(FedAvg(train=TRAIN, weighting="uniform"), Mlp((16,), 1), people, rounds=2).rounds(2)
    assert mine.state.params.keys() == plain.state.params.keys()
    assert all(torch.equal(mine.state.params[n], plain.state.params[n]) for n in plain.state.params)
    assert mine.accuracy() == plain.accuracy()


def test_merged_weights_are_the_two_branches() -> None:
    params = Mlp((16,), 1, personal=4).initial()
    stream = torch.Generator().manual_seed(0)
    params = {n: t + 0.1 * torch.randn(t.shape, generator=stream) for n, t in params.items()}
    merged = {n: t for n, t in params.items() if not n.endswith(PRIVATE)}
    for layer in "01":
        a, b = (params[f"{layer}.personal.lora_{part}"] for part in "AB")
        merged[f"{layer}.weight"] = merged[f"{layer}.weight"] + b @ a / 4
    x = torch.randn(7, 64, generator=stream)
    assert torch.allclose(logits(params, x), logits(merged, x), atol=1e-5)


def test_together_moves_both_in_one_fit(people: Any) -> None:
    play, fits = recorded("together", people, 1)
    assert len(fits) == 1 and len(fits[0]["moved"]) == 8 and fits[0]["report"].steps == 5
    assert set(play.kept("c0")["tau"]) == {n for n in fits[0]["moved"] if n.endswith(PRIVATE)}
    assert not any("lora" in name for name in play.state.params)


def test_a_new_client_trains_its_part_before_it_is_measured_and_keeps_nothing(people: Any) -> None:
    play = start(FedLoRA(train=TRAIN.model_copy(update={"steps": 200, "lr": 0.1})), people, rounds=4)
    before = play.mean()
    assert play.mean() == before and play.worker.private.clients() == []
    none = start(FedLoRA(train=TRAIN, share=0.0), people).mean()
    assert before > none + 0.05, "tau of a fresh model reads the client's own labels"


class Breaks(FedLoRA, abstract=True):
    """The private phase of c1 does not stay finite."""

    async def _phase(self, client: Client, moving: Any, still: Any, private: bool) -> Any:
        if private and client.id == "c1" and client.round == 2:
            raise RoundFailed("not finite")
        return await super()._phase(client, moving, still, private)


def test_a_private_part_that_is_not_finite_begins_anew_and_says_so(people: Any) -> None:
    seen: dict[str, Any] = {}

    class Noted(Breaks, abstract=True):
        def finalize(self, state: Any, update: Any) -> Any:
            seen[str(state.round)] = update.metrics.get("private_resets")
            return super().finalize(state, update)

    play = start(Noted(train=TRAIN), people, rounds=2).rounds(2)
    assert [record.used for record in play.records] == [3, 3]
    assert seen == {"0": None, "1": (1.0, 1.0)}
    fresh = Mlp((16,), 1, personal=4).initial()
    tau = play.kept("c1")["tau"]
    assert all(torch.equal(tau[n], fresh[n]) for n in tau)


def test_shared_weights_that_are_not_finite_are_refused(people: Any) -> None:
    wild = TRAIN.model_copy(update={"lr": 1e30})
    play = start(FedLoRA(train=wild, rank=0), people, 0).rounds(1)
    assert play.records[0].failed and all("not finite" in entry["reason"] for entry in play.records[0].lost)


@pytest.mark.parametrize(("steps", "share"), [(1, 0.4), (2, 0.9), (3, 0.1)])
def test_each_part_needs_a_step(steps: int, share: float) -> None:
    with pytest.raises(ConfigError, match=r"leaves \d for the private part.*train\.steps or change method\.share"):
        FedLoRA(train=Train(steps=steps), share=share)
    assert FedLoRA(train=Train(steps=steps), share=share, rank=0).rank == 0
    assert FedLoRA(train=Train(steps=steps), share=0.0).share == 0.0


def test_all_of_the_work_cannot_be_private() -> None:
    with pytest.raises(ValueError, match="less than 1"):
        FedLoRA(share=1.0)
    with pytest.raises(ConfigError, match=r"leaves 0 .* train\.epochs"):
        FedLoRA(train=Train(epochs=1))


def test_a_model_without_a_private_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no private part.*adapter\.personal=4"):
        FedLoRA(train=TRAIN).init(Mlp((16,), 1).initial())


def test_what_it_asks_of_the_adapter() -> None:
    assert FedLoRA().adapter() == {"personal": 4} and FedLoRA(rank=0).adapter() == {"personal": 0}
    assert FedLoRA().weighting == "uniform" and FedLoRA().linear()
