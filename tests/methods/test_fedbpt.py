"""FedBPT - bytes, ranks, no graphs, state that goes on to the same bits, clients that fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.blocks.evolution import vectors
from fedllm.blocks.subspace import Subspace
from fedllm.core.errors import ConfigError
from fedllm.core.message import Dense
from fedllm.core.reducer import Collect, Mean, Update
from fedllm.core.server import Server
from fedllm.core.settings import read
from fedllm.core.state import State
from fedllm.core.wire import decode, encode
from fedllm.data.federation import Federation
from fedllm.effects.fedbpt import found
from fedllm.effects.rig import Play
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.rounds import play_round
from fedllm.methods.blackbox.fedbpt import WORST, FedBPT
from fedllm.run import Watch, resume, run
from fedllm.tasks.function import FunctionLearner

pytest.importorskip("cma", reason="needs the extra 'blackbox'")
TOY: Any = {"subspace": {"size": 4, "spread": 1.0}, "candidates": 4, "iterations": 2, "fitness": "loss"}


def bowl(params: Any, examples: Any) -> torch.Tensor:
    """|prompt - x|^2: its optimum is the mean of the rows."""
    return torch.stack([(params["prompt"] - x).square().sum() for x in examples]).sum()


def play(rounds: int = 1, clients: int = 4, width: int | None = None, loss: Any = bowl, **options: Any) -> Play:
    learner: Any = FunctionLearner(loss, {"prompt": torch.zeros(3)})
    rows = {f"c{k}": [{"x": [1.0, 2.0, k / 4]}, {"x": [1.0, 2.0, 0.0]}] for k in range(clients)}
    made = Play(FedBPT(**{**TOY, **options}), learner, rows, width=width, rounds=rounds)
    made.rounds(rounds)
    return made


class Kept:
    """An engine that keeps what it carries."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.down, self.up = engine, [], []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    async def ask(self, requests: Any, deadline: Any) -> Any:
        def noted() -> Any:
            for request in requests:
                self.down.append(decode(request.body))
                yield request

        async for reply in self.engine.ask(noted(), deadline):
            self.up.append(decode(reply.body))
            yield reply


def watched(**options: Any) -> Kept:
    learner: Any = FunctionLearner(bowl, {"prompt": torch.zeros(3)})
    method = FedBPT(**{**TOY, **options})
    federation = Federation.of({f"c{k}": {"train": [{"x": [1.0, 2.0, float(k)]}]} for k in range(3)})
    engine = Kept(LocalEngine(LocalWorker(learner, method, federation, 0), federation.client_ids, 3))
    asyncio.run(play_round(method, method.init(learner.initial()), Server(engine, 0), 3))
    return engine


def test_what_travels_is_counted_to_the_number() -> None:
    """Up: d + 1 + I + 1 numbers of float64. Down: d, d x d and one."""
    engine = watched()
    for upload in engine.up:
        assert {n: t.numel() for n, t in upload.update.items()} == {"z": 4, "fitness": 1, "sigmas": 2, "parents": 1}
        assert all(t.dtype == torch.float64 for t in upload.update.values()) and list(upload.parts) == ["update"]
    assert {n: tuple(t.shape) for n, t in engine.down[0]["search"].items()} == {
        "mean": (4,),
        "sigma": (1,),
        "C": (4, 4),
    }
    assert {n: t.numel() for n, t in watched(server="mean").up[0].update.items()} == {"z": 4}
    assert list(watched(server="mean").down[0]["search"]) == ["mean", "sigma"], "nothing that is not needed"
    defaults = FedBPT().expected(State({}))["update"]
    assert 8 * sum(t.numel() for t in defaults.values()) == 4080


def test_it_is_forward_only() -> None:
    """Every loss is computed with gradients off, and not one request is a fit."""
    graphs = []

    def spying(params: Any, examples: Any) -> torch.Tensor:
        value = bowl(params, examples)
        graphs.append((torch.is_grad_enabled(), value.requires_grad))
        return value

    made = play(2, loss=spying)
    assert graphs and set(graphs) == {(False, False)}
    assert made.server.meter.steps == 0


def test_the_number_of_forward_passes() -> None:
    calls = []
    play(1, clients=1, loss=lambda p, e: calls.append(len(e)) or bowl(p, e))
    assert sum(calls) == (2 * 4 + 1) * 2, "two iterations of four candidates and the mean, two rows"


def test_it_finds_the_optimum() -> None:
    made = play(25)
    assert torch.allclose(made.state.params["prompt"], torch.tensor([1.0, 2.0, 0.1875]), atol=0.25)
    assert made.records[-1].loss is not None and made.records[-1].loss < 0.2


def test_the_servers_mean_is_the_rank_weighted_sum() -> None:
    method = FedBPT(**TOY)
    state = method.init({"prompt": torch.zeros(3)})
    zs = [torch.tensor([0.1 * k, 0.0, 0.2, -0.1]).double() for k in range(3)]
    parts: Any = {
        f"c{k}": Dense({"z": z, **vectors(fitness=[f], sigmas=[1.0, 1.0], parents=[1.0])})
        for k, (z, f) in enumerate(zip(zs, (2.0, 1.0, WORST), strict=True))
    }
    new = method.finalize(state, Update(collected={"update": parts}, clients=3))
    weights = torch.tensor([3.5 / r for r in (1, 2, 3)]).double().log()
    weights = weights / weights.sum()
    expected = weights[0] * zs[1] + weights[1] * zs[0] + weights[2] * zs[2]
    assert torch.allclose(new.memory["search"]["mean"], expected, atol=1e-12)
    assert torch.equal(new.params["prompt"], method.subspace.prompt(new.memory["search"]["mean"], torch.zeros(3)))


def test_averaging_is_linear_and_is_the_mean() -> None:
    assert isinstance(FedBPT(server="mean").reducer, Mean) and FedBPT(server="mean").linear()
    assert isinstance(FedBPT().reducer, Collect) and not FedBPT().linear()
    engine = watched(server="mean")
    made = play(1, clients=3, server="mean", weighting="uniform")
    assert made.state.memory["search"]["mean"].dtype == torch.float64
    assert len(engine.up) == 3 and torch.equal(made.state.memory["search"]["C"], torch.eye(4).double())


@pytest.mark.parametrize("clients", [1, 2, 3, 5])
def test_any_number_of_clients(clients: int) -> None:
    made = play(4, clients=clients)
    assert all(record.failed is None and record.used == clients for record in made.records)
    assert made.records[-1].loss is not None and made.records[0].loss is not None
    assert made.records[-1].loss < made.records[0].loss


def test_one_client_is_taken_as_it_is() -> None:
    engine_mean = play(1, clients=1).state.memory["search"]["mean"]
    assert torch.equal(engine_mean, play(1, clients=1, server="mean").state.memory["search"]["mean"])


def test_width_changes_no_bit() -> None:
    one, many = play(4, width=1), play(4, width=4)
    assert all(torch.equal(t, many.state.memory["search"][n]) for n, t in one.state.memory["search"].items())


def test_a_loss_that_is_no_number_is_the_worst_and_is_not_sent() -> None:
    """Left of 0 the loss is NaN: the search goes right, and no upload is refused."""

    def half(params: Any, examples: Any) -> torch.Tensor:
        return bowl(params, examples) + torch.where(params["prompt"][0] < 0, float("nan"), 0.0)

    made = play(12, loss=half)
    assert not any(record.rejected for record in made.records)
    assert float(made.state.params["prompt"][0]) > 0


def test_a_client_without_any_loss_is_lost_and_the_rest_counts() -> None:
    def broken(params: Any, examples: Any) -> torch.Tensor:
        bad = any(float(x[2]) == 0.75 for x in examples)
        return bowl(params, examples) + (float("nan") if bad else 0.0)

    made = play(2, loss=broken)
    assert [entry["client"] for entry in made.records[-1].lost] == ["c3"] and made.records[-1].used == 3
    assert "a loss that is a number" in made.records[-1].lost[0]["reason"]


def test_the_state_goes_on_from_its_bytes_to_the_same_bits() -> None:
    whole = play(6)
    cut = play(3)
    cut.state = State.from_message(decode(encode(cut.state.to_message())))
    cut.server.rounds = 6
    cut.rounds(3)
    assert all(torch.equal(t, cut.state.memory["search"][n]) for n, t in whole.state.memory["search"].items())
    assert torch.equal(whole.state.params["prompt"], cut.state.params["prompt"])


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    class Kill(Watch):
        def round(self, name: str, record: Any, values: Any) -> None:
            if record.round == 2:
                raise KeyboardInterrupt

    data = {f"c{k}": {"train": [{"instruction": f"say a{k}{i}", "response": "ab"} for i in range(3)]} for k in range(3)}
    method = {"name": "fedbpt", "subspace": {"size": 12}, "candidates": 3, "iterations": 2}
    recipe = {"name": "b", "rounds": 4, "method": method, "model": {"name": "toy:llama"},
              "adapter": {"kind": "prompt", "tokens": 2}, "evaluation": {"against": []}}  # fmt: skip
    whole = run(recipe, data=data, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, data=data, folder=tmp_path / "cut", watch=Kill())
    again = resume(tmp_path / "cut", data=data)
    assert torch.equal(whole.state.params["prompt"], again.state.params["prompt"])
    assert all(torch.equal(t, again.state.memory["search"][n]) for n, t in whole.state.memory["search"].items())
    assert not torch.equal(whole.state.params["prompt"], whole.state.memory["first"]["prompt"])


def test_scrambling_changes_what_is_found_and_each_round_scrambles_anew(tmp_path: Path) -> None:
    data = {"a": {"train": [{"instruction": f"say b{i} c{i}", "response": "ab"} for i in range(4)]}}
    found_at = {}
    for fitness in ("loss", "ratio"):
        method = {"name": "fedbpt", "subspace": {"size": 8}, "candidates": 4, "iterations": 2, "fitness": fitness}
        recipe = {"name": "b", "rounds": 1, "method": method, "model": {"name": "toy:llama"},
                  "adapter": {"kind": "prompt", "tokens": 2}, "evaluation": {"against": []}}  # fmt: skip
        found_at[fitness] = run(recipe, data=data, folder=tmp_path / fitness).state.params["prompt"]
    assert not torch.equal(found_at["loss"], found_at["ratio"])


@pytest.mark.parametrize(
    ("options", "says"),
    [({"perturb": 0.0}, "perturb"), ({"candidates": 2}, "candidates"), ({"subspace": {"size": 1}}, "size"),
     ({"floor": 0.0}, "floor"), ({"server": "median"}, "server"), ({"iterations": 0}, "iterations")],
)  # fmt: skip
def test_options_that_are_refused(options: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(FedBPT, options, "method")


def test_a_prompt_without_a_scale_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match="no scale to search at"):
        FedBPT().init({"prompt": torch.zeros(3)})


def test_only_the_prompt_moves() -> None:
    method = FedBPT()
    assert method.trainable("prompt") and not method.trainable("classifier.weight")
    assert method.adapters == ("prompt",) and Subspace().size == 500


@pytest.mark.slow
def test_the_toy_of_the_card() -> None:
    assert found(4, "iid")[0] > 0.85
