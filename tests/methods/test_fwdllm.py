"""FwdLLM - forward gradients, pacing and filtering; both uploads are one update; theta rests while the pool grows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from fedllm.blocks.zeroth import Weighed, cosines, direction, pairs
from fedllm.core.errors import ConfigError
from fedllm.core.message import Upload
from fedllm.core.method import on_client
from fedllm.core.reducer import Update
from fedllm.core.state import CollectMore, State
from fedllm.core.train import Schedule, Train
from fedllm.core.wire import decode
from fedllm.engine.rounds import play_round
from fedllm.methods.silo_and_device.fwdllm import FwdLLM

TRAIN = Train(batch_size=4, lr=0.02, optimizer="sgd", clip_norm=None)


def method(**options: Any) -> FwdLLM:
    return FwdLLM(**{"train": TRAIN, "most": 1, **options})


def flat(tree: Any) -> torch.Tensor:
    return torch.cat([t.flatten() for _, t in sorted(tree.items())]).double()


def received(played: Any) -> list[Any]:
    """Everything clients were sent, as it was decoded."""
    seen: list[Any] = []
    answer = played.worker.answer

    def listening(requests: Any) -> Any:
        requests = list(requests)
        seen.extend((r.client, r.round, r.turn, decode(r.body)) for r in requests)
        yield from answer(requests)

    played.worker.answer = listening
    return seen


@pytest.mark.parametrize("options", [{}, {"most": 3, "threshold": 1e-9}, {"perturbations": 4}, {"candidates": 5}])
def test_estimates_and_pairs_are_one_update(play: Any, people: Any, net: Any, options: dict[str, Any]) -> None:
    a, b = (play(method(upload=u, **options), people, 3, **net) for u in ("estimate", "pairs"))
    for name in a.state.params:
        assert torch.allclose(a.state.params[name], b.state.params[name], atol=1e-4), name
        assert torch.allclose(a.states[1].params[name], b.states[1].params[name], atol=2e-6), name
        assert not torch.equal(a.state.params[name], a.states[0].params[name])


def test_the_mean_of_many_probes_is_the_gradient(play: Any, two: Any) -> None:
    """On a quadratic the central difference has no error, whatever eps: one weight, relative error of 1 / sqrt(n)."""
    plain = Train(batch_size=1, lr=1.0, optimizer="sgd", clip_norm=None)
    found = play(FwdLLM(train=plain, perturbations=4000, eps=0.5, most=1), {"b": two["b"]}, 1)
    assert found.w == pytest.approx(5.0, rel=0.1)  # the gradient at 0 is -5
    seed = FwdLLM(train=plain, perturbations=1, eps=0.5, most=1, upload="pairs")
    once = play(seed, {"b": two["b"]}, 1)
    z = (once.w / 5.0) ** 0.5  # w = -lr g z = 5 z^2
    assert 0 < z < 6


def test_the_pool_grows_and_theta_rests(play: Any, people: Any, net: Any) -> None:
    """On ACCUMULATE theta is bit-identical, the data are the same, the directions are others; the cap commits."""
    never = method(most=3, threshold=1e-12, upload="pairs")
    played = play(never, people, 0, **net)
    seen = received(played)
    uploads: list[dict[str, Any]] = []
    finalize = FwdLLM.finalize

    class Seeing(FwdLLM, abstract=True):
        def finalize(self, state: State, update: Update) -> State | CollectMore:
            uploads.append(dict(update.collected["update"]))
            return finalize(self, state, update)

    seeing = Seeing(**never.model_dump())
    state, record = asyncio.run(play_round(seeing, played.state, played.server, 4))
    assert (record.failed, record.used, record.cohort) == (None, 12, sorted(people))
    assert [len(u) for u in uploads] == [4, 8, 12]
    assert {turn for _, _, turn, _ in seen} == {0, 1, 2} and len(seen) == 12
    for _, _, _, message in seen:
        assert all(torch.equal(message.params[n], t) for n, t in net["start"].items())
    drawn = [int(part.tensors["seed"][0]) for part in uploads[-1].values()]
    assert len(set(drawn)) == 12
    assert state.round == 1 and not torch.equal(state.params["w"], net["start"]["w"])


def pooled(method: FwdLLM, parts: dict[str, Any], state: State) -> Any:
    update = Update(clients=len(parts), population=4, collected={"update": parts})
    return method.finalize(state, update)


def test_equal_estimates_have_no_variance_and_commit() -> None:
    made, state = method(most=8, threshold=1e-12), State({"w": torch.zeros(3)}, numbers={"rounds": 10})
    same = {c: Weighed({"w": torch.tensor([1.0, 2.0, 0.0])}, 1.0) for c in "abcd"}
    found = pooled(made, same, state)
    assert isinstance(found, State) and torch.allclose(found.params["w"], torch.tensor([-0.02, -0.04, 0.0]))
    other = {**same, "a": Weighed({"w": torch.tensor([1.0, 2.0, 0.1])}, 1.0)}
    assert pooled(made, other, state) == CollectMore(again=True)
    assert isinstance(pooled(method(most=8, threshold=1e-3), other, state), State)


def test_the_variance_is_that_of_the_two_half_means() -> None:
    """Halves a, c and b, d: means 2 and 1, variance 1/2; relative to the pooled mean square (3/2)^2: 2/9."""
    state = State({"w": torch.zeros(1)}, numbers={"rounds": 1})
    parts = {c: Weighed({"w": torch.tensor([x])}, 1.0) for c, x in zip("abcd", (1.0, 1.0, 3.0, 1.0), strict=True)}
    for options, edge in (({}, 0.5), ({"relative": True}, 2 / 9)):
        assert isinstance(pooled(method(most=2, threshold=edge * 1.001, **options), parts, state), State)
        assert pooled(method(most=2, threshold=edge * 0.999, **options), parts, state) == CollectMore(again=True)


def test_one_contribution_cannot_be_split() -> None:
    state, one = State({"w": torch.zeros(1)}, numbers={"rounds": 1}), {"a": Weighed({"w": torch.ones(1)}, 1.0)}
    assert pooled(method(most=3, threshold=1e9), one, state) == CollectMore(again=True)
    last = {**one, "a@1": one["a"], "a@2": one["a"]}
    assert isinstance(pooled(method(most=3, threshold=1e-9), last, state), State), "the cap"


def test_a_client_cannot_count_for_more_than_it_was_asked() -> None:
    state = State({"w": torch.zeros(1)}, numbers={"rounds": 1})
    found = pooled(method(), {c: Weighed({"w": torch.ones(1)}, w) for c, w in (("a", 1.0), ("b", 1e9))}, state)
    assert found.params["w"].item() == pytest.approx(-0.02)


def test_filtering_in_every_second_update(play: Any, people: Any, net: Any) -> None:
    made = method(candidates=10, perturbations=2, upload="pairs")
    found = play(made, people, 4, **net)
    assert [bool(s.memory.get("gradient")) for s in found.states[1:]] == [True, False, True, False]
    gradient = found.states[1].memory["gradient"]
    moved = {n: (found.states[0].params[n] - t) / 0.02 for n, t in found.states[1].params.items()}
    assert all(torch.allclose(gradient[n], moved[n], atol=1e-4) for n in gradient)


def test_filtered_directions_are_the_nearest_of_those_drawn(play: Any, people: Any, net: Any) -> None:
    chosen: list[tuple[list[int], Any]] = []

    class Seeing(FwdLLM, abstract=True):
        @on_client
        async def work(self, client: Any, given: Any) -> Upload:
            upload = await super().work(client, given)
            if "gradient" in given.parts:
                drawn = client.rng("seeds").integers(2**31, size=20).tolist()
                near = cosines(given["gradient"], drawn).sort(descending=True).indices[:2].tolist()
                chosen.append((sorted(drawn[i] for i in near), sorted(upload.update["seed"].tolist())))
                assert min(cosines(given["gradient"], upload.update["seed"].tolist())) > 0
            return upload

    play(Seeing(train=TRAIN, most=1, candidates=10, perturbations=2, upload="pairs"), people, 2, **net)
    assert len(chosen) == 4 and all(expected == got for expected, got in chosen)


def test_tensors_that_do_not_train_have_no_estimate(play: Any, people: Any, net: Any) -> None:
    class Some(FwdLLM, abstract=True):
        def trainable(self, name: str) -> bool:
            return name != "b"

    found = play(Some(train=TRAIN, most=1), people, 1, **net)
    assert set(found.state.params) == {"w", "v"}


def test_the_schedule_is_the_servers(play: Any, people: Any, net: Any) -> None:
    falling = TRAIN.model_copy(update={"schedule": Schedule(kind="linear", warmup=0.25)})
    found, plain = (play(method(train=t), people, 4, **net) for t in (falling, TRAIN))
    for number in (1, 2):
        a, b = (flat(p.states[number].params) - flat(p.states[number - 1].params) for p in (found, plain))
        if number == 1:
            assert torch.allclose(a, b, atol=1e-7), "a warm-up of one round, then full"
    assert not torch.allclose(flat(found.state.params), flat(plain.state.params))


@pytest.mark.parametrize("upload", ["estimate", "pairs"])
def test_a_probe_without_a_loss_is_dropped(play: Any, people: Any, net: Any, upload: Any) -> None:
    def loss(params: Any, examples: Any) -> torch.Tensor:
        odd = float(params["v"][0]) > float(net["start"]["v"][0]) and float(params["v"][1]) > float(
            net["start"]["v"][1]
        )
        return net["loss"](params, examples) * (float("nan") if odd else 1.0)

    found = play(method(perturbations=8, upload=upload), people, 1, loss=loss, start=net["start"])
    assert found.records[0].failed is None and found.records[0].used >= 3
    assert all(bool(torch.isfinite(t).all()) for t in found.state.params.values())


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        method().init({})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"train": Train()}, "optimizer=adamw cannot be used: the server makes plain gradient steps"),
        ({"train": TRAIN.model_copy(update={"weight_decay": 0.1})}, "weight_decay=0.1"),
        ({"train": TRAIN.model_copy(update={"clip_norm": 1.0})}, "clip_norm=1.0"),
    ],
)
def test_what_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FwdLLM(**options)


@pytest.mark.parametrize(
    "options", [{"most": 0}, {"most": 9}, {"candidates": 0}, {"perturbations": 0}, {"threshold": 0}, {"eps": 0}]
)
def test_sizes_that_are_no_sizes(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FwdLLM(**options)


def test_pairs_are_eight_bytes_a_probe(play: Any, people: Any, net: Any) -> None:
    found = play(method(perturbations=3, upload="pairs"), people, 2, **net)
    assert found.server.meter.bytes["work/up/update"] == 2 * 4 * 3 * 8
    sent = pairs([1], torch.ones(1))
    assert sum(t.nbytes for t in sent.values()) == 8 and direction(1, "w", torch.zeros(2)).shape == (2,)
    assert not method().linear()
