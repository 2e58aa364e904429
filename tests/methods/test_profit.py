"""Profit - stage 1 is FedAvg or FedSGD, stage 2 measures what it says, and nothing of it changes the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm.profit
from fedllm.core.errors import ConfigError
from fedllm.core.message import Received
from fedllm.core.train import Train
from fedllm.effects.profit import rig
from fedllm.effects.rig import Play
from fedllm.methods.baseline.fedadam import FedAdam
from fedllm.methods.baseline.fedavg import FedAvg
from fedllm.methods.evaluation.profit import Profit
from tests.contract.conftest import clients

SGD = Train(steps=1, lr=0.1, optimizer="sgd", clip_norm=None, batch_size=1000)


def same(left: Any, right: Any, atol: float = 1e-6) -> bool:
    return all(torch.allclose(t, right.state.params[n], atol=atol) for n, t in left.state.params.items())


def test_plain_profit_is_fedavg(play: Any, net: Any, people: Any) -> None:
    train = Train(steps=3, lr=0.05, batch_size=3)
    options = {"weighting": "examples"}
    assert same(play(Profit(train=train, **options), people, 3, **net), play(FedAvg(train=train), people, 3, **net), 0)


def test_fedsgd_is_fedavg_with_one_step_and_the_product_of_rates(play: Any, net: Any, people: Any) -> None:
    options = {"weighting": "examples"}
    sgd = play(Profit(train=SGD, algorithm="fedsgd", server_lr=0.1, **options), people, 3, **net)
    avg = play(Profit(train=SGD, server_lr=1.0, **options), people, 3, **net)
    assert same(sgd, avg)


def test_adam_at_the_server_is_fedadam(play: Any, net: Any, people: Any) -> None:
    train = Train(steps=3, lr=0.05, batch_size=3)
    given = {"train": train, "server_lr": 0.02}
    assert same(play(Profit(server="adam", **given), people, 3, **net), play(FedAdam(**given), people, 3, **net), 0)


@pytest.fixture(scope="module")
def trained() -> Play:
    learner, federation = rig(0)
    method = Profit(train=Train(steps=2, batch_size=16, lr=0.1, optimizer="sgd", clip_norm=None))
    rows = {client: list(federation.rows(client)) for client in federation.client_ids}
    play = Play(method, learner, rows, rounds=2)
    play.worker.rows = federation
    play.rounds(2)
    return play


def personal(play: Play, **changes: Any) -> list[list[dict[str, Any]]]:
    import asyncio

    train = {"batch_size": 16, "lr": 0.1, "optimizer": "sgd", "clip_norm": None}
    grid = {"train": train, "points": [0, 2, 5], "mixes": [0.0, 0.5, 1.0], "near": 0.0, **changes}

    async def ask() -> list[list[dict[str, Any]]]:
        payloads = {client: Received(play.state.params, grid) for client in play.server.clients}
        return [a.upload.numbers["rows"] async for a in play.server.ask(play.method.personal, payloads)]  # type: ignore[attr-defined]

    return asyncio.run(ask())


def test_no_steps_and_no_mix_are_the_global_prompt_exactly(trained: Play) -> None:
    for rows in personal(trained):
        by = {(row["steps"], row["mix"]): row for row in rows}
        assert len(by) == 9 and by[0, 1.0]["moved"] == 0.0
        for steps in (2, 5):
            assert by[steps, 0.0]["personal"] == by[0, 1.0]["personal"]
            assert by[steps, 0.0]["global"] == by[0, 1.0]["global"]
        assert by[5, 1.0]["personal"] != by[0, 1.0]["personal"]


def test_the_curve_goes_on_where_it_was_and_does_not_begin_anew(trained: Play) -> None:
    through = [rows[-1] for rows in personal(trained, points=[0, 2, 5], mixes=[1.0])]
    at_once = [rows[-1] for rows in personal(trained, points=[5], mixes=[1.0])]
    for a, b in zip(through, at_once, strict=True):
        assert a["moved"] == pytest.approx(b["moved"], rel=1e-5)
        assert a["personal"]["loss"] == pytest.approx(b["personal"]["loss"], rel=1e-4)


def test_the_further_the_pull_the_nearer_the_prompt(trained: Play) -> None:
    moved = [
        sum(rows[-1]["moved"] for rows in personal(trained, points=[5], mixes=[1.0], near=near))
        for near in (0.0, 0.3, 1.0, 3.0)
    ]
    assert moved == sorted(moved, reverse=True) and moved[-1] < 0.7 * moved[0]


def test_a_prompt_that_runs_away_leaves_the_global_one_and_is_marked(trained: Play) -> None:
    wild = {"batch_size": 16, "lr": 1e38, "optimizer": "sgd", "clip_norm": None}
    rows = personal(trained, train=wild, mixes=[1.0], near=1.0)[0]
    assert [row["diverged"] for row in rows] == [False, True, True]
    assert rows[2]["personal"] == rows[0]["personal"] and rows[2]["moved"] == 0.0


def test_stage_two_changes_nothing(trained: Play) -> None:
    before = {n: t.clone() for n, t in trained.state.params.items()}
    assert personal(trained) == personal(trained)
    assert all(torch.equal(t, trained.state.params[n]) for n, t in before.items())


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "p", "rounds": 2, "method": "profit", "train": {"steps": 2, "batch_size": 2}, "runs": str(folder),
        "model": {"name": "toy:llama"}, "adapter": {"kind": "prompt", "tokens": 4},
        "task": {"max_length": 64, "template": "plain"}, **changes,
    }  # fmt: skip


def test_the_command_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    found = fedllm.profit.profit(
        recipe(tmp_path), [0.01, 0.1], [0, 2], [1.0, 0.5], data=clients(), folder=tmp_path / "f"
    )
    assert len(found.rows) == 8 and found.metric == "exact_match"
    assert any(row["frontier"] for row in found.rows) and all(row["clients"] == 4 for row in found.rows)
    assert {p.name for p in found.folder.iterdir()} >= {"profit.json", "profit.md", "profit.svg"}
    assert (found.folder / "profit.md").read_text().count("\n") == 10


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (([], [0], [1.0]), "rates"),
        (([-1.0], [0], [1.0]), "positive"),
        (([0.1], [4, 1], [1.0]), "rise"),
        (([0.1], [1], [1.5]), "share"),
    ],
)
def test_a_wrong_grid_is_refused(given: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        fedllm.profit.profit(recipe(tmp_path), *given, data=clients(), folder=tmp_path / "f")


def test_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method is fedavg"):
        fedllm.profit.profit(recipe(tmp_path, method="fedavg"), data=clients(), folder=tmp_path / "f")
