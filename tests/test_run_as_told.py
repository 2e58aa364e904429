"""Runs do what they tell: failed rounds are played again, baselines get the same budget, all bytes are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.core.errors import ConfigError, ModeConflict, RoundFailed
from fedllm.core.work import Fit
from fedllm.engine import together
from fedllm.engine.local import LocalWorker
from fedllm.methods import find
from fedllm.profit import profit
from fedllm.recipe import load_recipe
from fedllm.run import method_of, prepare, resume, run

RECIPE: dict[str, Any] = {
    "name": "told", "rounds": 1, "method": {"name": "fedavg"}, "model": {"name": "toy:llama"},
    "task": {"max_length": 48, "template": "plain"}, "train": {"steps": 1, "batch_size": 2, "lr": 0.01},
    "evaluation": {"against": []},
}  # fmt: skip


def clients() -> dict[str, dict[str, list[dict[str, str]]]]:
    rows = {c: [{"instruction": f"say {c} {n}", "response": f"{c}{n}"} for n in range(8)] for c in ("a", "b", "d")}
    return {client: {"train": held[:6], "eval": held[6:]} for client, held in rows.items()}


def test_a_failed_round_is_played_again_when_the_cause_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as broken:
        broken.setattr(LocalWorker, "answer", _nobody)
        with pytest.raises(RoundFailed):
            run(RECIPE, data=clients(), folder=folder)
    found = resume(folder, data=clients())
    whole = run(RECIPE, data=clients(), folder=tmp_path / "whole")
    assert found.finished and found.value(metric="loss") == whole.value(metric="loss")
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["used"] for one in rounds if one["event"] == "round"] == [3]


def _nobody(self: LocalWorker, requests: Any) -> Any:
    from fedllm.core.server import Reply

    return iter([Reply(one.id, one.client, None, "out of memory") for one in requests])


def test_models_to_compare_with_train_as_the_method_is_told_to() -> None:
    recipe = load_recipe({**RECIPE, "method": {"name": "fedprox", "train": {"steps": 7}}})
    assert method_of(recipe).train.steps == 7
    assert method_of(recipe, "local").train.steps == method_of(recipe, "central").train.steps == 7
    own = load_recipe({**RECIPE, "method": {"name": "fedprox", "train": {"steps": 7}}, "methods": {
        "local": {"train": {"steps": 3}}}})  # fmt: skip
    assert method_of(own, "local").train.steps == 3 and method_of(own, "fedavg").train.steps == 1


def test_no_codec_is_around_the_models_to_compare_with(tmp_path: Path) -> None:
    against = {"evaluation": {"against": ["central"]}}
    plain = run({**RECIPE, **against}, data=clients(), folder=tmp_path / "plain")
    coded = run({**RECIPE, **against, "codec": {"kind": "topk"}}, data=clients(), folder=tmp_path / "coded")
    assert coded.value("central", "loss") == plain.value("central", "loss")
    assert coded.value(metric="loss") != plain.value(metric="loss")


def test_what_a_codec_would_wreck_is_refused() -> None:
    for key in ("flexlora", "hetlora", "fedkseed"):
        with pytest.raises(ModeConflict, match=r"codec\.kind=topk"):
            prepare(load_recipe({**RECIPE, "method": key, "codec": {"kind": "topk"}}), clients())
    prepare(load_recipe({**RECIPE, "method": "hetlora", "codec": {"kind": "int8"}}), clients())
    with pytest.raises(ModeConflict, match="protocol"):
        prepare(load_recipe({**RECIPE, "method": "decentralized-gossip", "codec": {"kind": "int8"}}), clients())


def test_sums_that_no_longer_match_what_clients_keep_are_refused() -> None:
    pytest.importorskip("dp_accounting")
    privacy = {"privacy": {"noise": 1.0, "delta": 0.01}}
    for key, more in (("scaffold", privacy), ("scaffold", {"defence": {"name": "median"}})):
        method = {"name": key, "weighting": "uniform"}
        with pytest.raises(ModeConflict, match="keep what they sent"):
            prepare(load_recipe({**RECIPE, "method": method, **more}), clients())
    products = {"name": "flexlora", "weighting": "uniform", "upload": "products"}
    with pytest.raises(ModeConflict, match="values and no changes"):
        prepare(load_recipe({**RECIPE, "method": products, **privacy}), clients())


def test_methods_without_a_shared_model_leave_no_adapter(tmp_path: Path) -> None:
    found = run({**RECIPE, "method": "local"}, data=clients(), folder=tmp_path / "run")
    assert found.finished and not (tmp_path / "run" / "adapter").exists()


def test_bytes_of_all_that_a_method_asks_for_are_counted(tmp_path: Path) -> None:
    method = {"name": "fedpeptao", "warm_up": 2, "lanczos": 2, "score_rows": 2}
    recipe = {**RECIPE, "method": method, "adapter": {"kind": "prefix"}}
    chosen = run({**recipe, "method": {**method, "share": 1.0}}, data=clients(), folder=tmp_path / "chosen")
    warmed = run(recipe, data=clients(), folder=tmp_path / "warmed")
    assert warmed.table["bytes"]["up"] > 2 * chosen.table["bytes"]["up"]  # two warm-up rounds, and what was measured


def test_profit_goes_on_in_its_folder_with_its_recipe_alone(tmp_path: Path) -> None:
    recipe = {**RECIPE, "method": "profit", "adapter": {"kind": "prompt"}}
    how: dict[str, Any] = {"lrs": [0.1], "steps": [0, 1], "data": clients(), "folder": tmp_path / "p"}
    first = profit(recipe, **how)
    assert profit(recipe, **how).rows == first.rows
    with pytest.raises(ConfigError, match="another recipe"):
        profit({**recipe, "seed": 1}, **how)


def test_clients_with_and_without_a_memory_of_momentum_do_not_share_a_pass() -> None:
    import torch

    method = find("fedavg")(train={"steps": 1, "optimizer": "sgd", "momentum": 0.9})
    start = {"w": torch.zeros(2)}

    def job(moments: dict[str, Any]) -> Any:
        return together.Job(Fit(start, method.train, moments=moments), "a", 0, 1, 1, lambda _: [], {})

    assert together.alike(job({})) != together.alike(job({"momentum_buffer.w": torch.ones(2)}))
    assert together.alike(job({})) == together.alike(job({}))


def test_compare_asks_what_a_run_asks() -> None:
    phones, rest = {"share": 0.4, "adapter": {"rank": 2}}, {"share": 0.6}
    groups = {"groups": {"phone": phones, "rest": rest}, "adapter": {"rank": 4}}
    with pytest.raises(ConfigError, match="needs the same ranks"):
        fedllm.compare({**RECIPE, **groups, "method": "hetlora"}, ["hetlora", "fedavg"], data=clients())
