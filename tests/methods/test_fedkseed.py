"""FedKSeed - (w0, A) stands for the mean of the clients; bytes do not depend on the model; bad replies are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import fedllm
from fedllm.blocks.zeroth import chances, pool, replay
from fedllm.core.errors import ConfigError
from fedllm.core.message import Upload
from fedllm.core.method import on_client
from fedllm.core.tensors import Tensors
from fedllm.core.train import Train
from fedllm.engine.client import TurnClient
from fedllm.methods.communication.fedkseed import FedKSeed
from fedllm.models.adapters.export import load_adapter
from fedllm.recipe import load_recipe
from fedllm.run import build_learner

TRAIN = Train(steps=6, batch_size=2, lr=0.01, optimizer="sgd", clip_norm=None)
START = {"w": torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).double()}


def loss(params: Tensors, examples: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = torch.stack(list(examples)).double()
    return (torch.tanh(rows[:, :-1] @ params["w"]).sum(1) - rows[:, -1]).square().sum()


def method(**options: Any) -> FedKSeed:
    return FedKSeed(**{"train": TRAIN, "pool_size": 32, "eps": 1e-3, **options})


def weights(found: Any, start: Tensors = START, lr: float = 0.01) -> Tensors:
    sums = found.state.memory["pool"]["sums"]
    return replay(start, pool(found.state.numbers["master"], len(sums)), sums, -lr)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_sums_stand_for_the_mean_of_the_clients_weights(
    play: Any, people: Any, monkeypatch: Any, weighting: Any
) -> None:
    """Invariant (a): to 1e-10 in float64, though slopes travel as float32."""
    finals: dict[str, Tensors] = {}
    probe = TurnClient.probe

    async def watching(self: TurnClient, *args: Any, **given: Any) -> Any:
        report = await probe(self, *args, **given)
        if not given.get("measure"):
            finals[self.id] = report.params
        return report

    monkeypatch.setattr(TurnClient, "probe", watching)
    found = play(method(weighting=weighting), people, 1, loss=loss, start=START)
    sizes = {c: len(rows) if weighting == "examples" else 1 for c, rows in people.items()}
    mean = sum(finals[c]["w"] * sizes[c] for c in people) / sum(sizes.values())
    assert torch.allclose(weights(found)["w"], mean, rtol=0, atol=1e-10)
    assert not torch.allclose(mean, START["w"], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "down", "up"),
    [
        ({}, 4 + 4 * 4096, 8 * 200),
        ({"pro": True}, 4 + 8 * 1024, 8 * 200),
        ({"pool_size": 100}, 4 + 400, 1600),
        ({"upload": "sums"}, 4 + 4 * 4096, 4 * 4096),
        ({"upload": "sums", "pro": True}, 4 + 8 * 1024, 3 * 4 * 1024),
    ],
)
def test_bytes_of_tensors(play: Any, options: dict[str, Any], down: int, up: int) -> None:
    """Invariant (b): 17,988 and 9,796 bytes a round trip with the paper's sizes, whatever the number of weights."""
    for size in (1, 50):
        start = {"w": torch.zeros(size)}
        meter = play(FedKSeed(**options), {"a": [(1.0, 0.0)]}, 1, start=start).server.meter.bytes
        tensors = {d: sum(n for k, n in meter.items() if f"/{d}/" in k and "header" not in k) for d in ("down", "up")}
        assert tensors == {"down": down, "up": up}
    if options in ({}, {"pro": True}):
        assert down + up == (9_796 if options else 17_988)


def test_sums_and_pairs_are_the_same_run(play: Any, people: Any) -> None:
    for pro in (False, True):
        a, b = (
            play(method(upload=u, pro=pro), people, 3, loss=loss, start=START).state.memory["pool"]
            for u in ("pairs", "sums")
        )
        assert all(torch.allclose(a[n], b[n], rtol=1e-5, atol=1e-5) for n in a)
    assert method(upload="sums").linear() and not method().linear()


def test_a_late_joiner_has_the_bits_of_an_old_client(play: Any, people: Any) -> None:
    """Invariant (d): the start of a turn is a function of (w0, A) alone."""
    seen: dict[str, list[tuple[bytes, ...]]] = {}

    class Seeing(FedKSeed, abstract=True):
        @on_client
        async def work(self, client: Any, received: Any) -> Upload:
            how = self._replay(received)
            params = replay(client.initial(), how.seeds, how.values, how.scale)
            seen.setdefault(client.id, []).append(tuple(t.numpy().tobytes() for t in params.values()))
            return await super().work(client, received)

    cohorts = [["p", "q"], ["p", "q"], list(people)]
    found = play(Seeing(train=TRAIN, pool_size=32), people, 3, loss=loss, start=START, cohorts=cohorts)
    assert {len(v) for c, v in seen.items() if c in "rs"} == {1}
    assert len({tuple(v[-1]) for v in seen.values()}) == 1 and seen["p"][0] != seen["p"][-1]
    assert not found.state.params, "no weights are kept at the server"


def test_measuring_replays(play: Any, people: Any) -> None:
    found = play(method(), people, 2, loss=loss, start=START, measure=True)
    held = {**found.state.memory["pool"]}
    held["sums"] = held["sums"].float().double()
    params = replay(START, pool(found.state.numbers["master"], 32), held["sums"], -0.01)
    for client, rows in people.items():
        exact = float(loss(params, [torch.tensor(row) for row in rows]))
        assert found.counts[client]["loss"] == pytest.approx(exact, rel=1e-5)


def test_the_finite_pool_bounds_where_weights_go(play: Any, people: Any) -> None:
    found = play(method(pool_size=1), people, 3, loss=loss, start=START)
    moved = weights(found)["w"] - START["w"]
    (seed,) = pool(found.state.numbers["master"], 1)
    line = replay({"w": torch.zeros_like(START["w"])}, [seed], torch.ones(1))["w"]
    assert float((moved - line * (moved * line).sum() / line.square().sum()).abs().max()) < 1e-12


def test_pro_prefers_large_slopes_and_counts_what_it_saw(play: Any, people: Any) -> None:
    found = play(method(pro=True), people, 4, loss=loss, start=START)
    held = found.state.memory["pool"]
    assert float(held["count"].sum()) == 4 * 4 * 6
    p = chances(held)
    assert float(p.sum()) == pytest.approx(1) and float(p.max() / p.min()) == pytest.approx(numpy.e)
    uniform = play(method(), people, 4, loss=loss, start=START)
    assert set(uniform.state.memory["pool"]) == {"sums"}


class Bad(FedKSeed, abstract=True):
    """Client q sends what no server should take."""

    how: str = "seed"
    """What is wrong with its upload."""

    @on_client
    async def work(self, client: Any, received: Any) -> Upload:
        """As FedKSeed, but for q."""
        upload = await super().work(client, received)
        if client.id == "q" or self.how.startswith("all"):
            name = "value" if self.how.endswith("nan") else "seed"
            upload.update[name][-1] = float("nan") if name == "value" else 32
        return upload


@pytest.mark.parametrize("how", ["nan", "seed"])
def test_a_bad_reply_is_refused_whole(play: Any, people: Any, same: Any, how: str) -> None:
    names = sorted(people)
    found = play(Bad(train=TRAIN, pool_size=32, how=how), people, 1, loss=loss, start=START, cohorts=[names])
    assert [r["client"] for r in found.records[0].rejected] == ["q"]
    others = play(method(eps=5e-4), people, 1, loss=loss, start=START, cohorts=[[c for c in names if c != "q"]])
    assert same(found.state, others.state)


def test_a_round_of_bad_replies_changes_nothing(play: Any, people: Any) -> None:
    found = play(Bad(train=TRAIN, pool_size=32, how="all seed"), people, 1, loss=loss, start=START)
    assert found.records[0].failed == "no usable upload arrived"
    assert not bool(found.state.memory["pool"]["sums"].any())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"train": Train(optimizer="sgd", clip_norm=None, weight_decay=0.1)}, "weight_decay=0.1 cannot be used: K"),
        ({"train": Train()}, "optimizer=adamw cannot be used: K sums .* Set train.optimizer=sgd"),
        ({"train": Train(optimizer="sgd", clip_norm=None, epochs=1)}, "epochs=1"),
    ],
)
def test_what_breaks_the_sums_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FedKSeed(**options)


@pytest.mark.parametrize("options", [{"pool_size": 0}, {"eps": 0.0}, {"limit": 0.0}, {"train": {"steps": 0}}])
def test_sizes_that_are_no_sizes(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FedKSeed(**options)


def test_defaults_are_the_papers() -> None:
    plain, pro = FedKSeed(), FedKSeed(pro=True)
    assert (plain.size, pro.size, plain.train.steps, plain.train.lr, plain.eps) == (4096, 1024, 200, 3e-7, 5e-4)


def test_a_run_saves_the_model_that_the_seeds_stand_for(tmp_path: Path) -> None:
    """The saved tensors, measured once more, score what the last evaluation measured by replaying at the client."""
    rows = [{"instruction": f"say {n}", "response": str(n)} for n in range(6)]
    recipe = load_recipe({
        "method": {"name": "fedkseed", "pool_size": 16}, "model": {"name": "toy:llama", "device": "cpu"},
        "adapter": {"kind": "full"}, "task": {"kind": "causal-lm", "max_length": 64, "template": "plain"},
        "train": {"steps": 2, "batch_size": 2, "lr": 1e-3}, "rounds": 2, "evaluation": {"against": []},
    })  # fmt: skip
    found = fedllm.run(recipe, data={"a": {"train": rows, "eval": rows}}, folder=tmp_path / "run")
    _, saved = load_adapter(tmp_path / "run/adapter")
    learner = build_learner(recipe, None, {})
    losses = []
    for tree in (saved, learner.initial()):
        with torch.no_grad(), learner.using({n: t.unsqueeze(0) for n, t in tree.items()}):
            counts = learner.counts_by_row([learner.prepare(rows)])
        losses.append(sum(c["loss"] for c in counts) / sum(c["tokens"] for c in counts))
    assert losses[0] == pytest.approx(found.value(metric="loss"), abs=1e-5)
    assert abs(losses[0] - losses[1]) > 1e-3  # it moved at all
