"""Runs do what they tell: failed rounds are played again, baselines get the same budget, all bytes are counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.core.errors import ConfigError, ModeConflict, RoundFailed
from fedllm.core.work import Fit
from fedllm.engine.job import Job, alike
from fedllm.engine.local import LocalEngine, LocalWorker
from fedllm.engine.passes import Passes
from fedllm.engine.width import Width
from fedllm.methods import find
from fedllm.profit import profit
from fedllm.recipe import load_recipe
from fedllm.run import Watch, method_of, prepare, resume, run

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


def begun(folder: Path, **changes: Any) -> Path:
    """A run of three rounds that was stopped after the first."""

    class Stop(Watch):
        def round(self, name: str, record: Any, values: Any) -> None:
            self.stop = True

    assert not run({**RECIPE, "rounds": 3, **changes}, data=clients(), folder=folder, watch=Stop()).finished
    return folder


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    folder, other = begun(tmp_path / "run"), clients()
    other["b"]["train"].append({"instruction": "say", "response": "more"})
    with pytest.raises(ConfigError, match=r"client 'b' has other rows") as refused:
        resume(folder, data=other)
    assert "3 clients were there and 3 are; 1 of them differ" in str(refused.value)
    del other["d"]
    with pytest.raises(ConfigError, match="3 clients were there and 2 are; 2 of them differ"):
        resume(folder, data=other)
    assert resume(folder, data=clients()).finished


def test_a_run_goes_on_with_the_width_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine, or an empty cache, would choose another width, and that gives other last bits."""
    used: list[Any] = []
    monkeypatch.setattr(LocalEngine, "__init__", _noting(LocalEngine.__init__, used))
    first = Width(2, "it was measured", 3, Passes(64, 512))
    monkeypatch.setattr(sys.modules["fedllm.run"], "choose", lambda *_: first)
    folder = begun(tmp_path / "run")
    monkeypatch.setattr(sys.modules["fedllm.run"], "choose", lambda *_: Width(1, "another machine"))
    resume(folder, data=clients())
    assert used == [first, first]


def _noting(function: Any, used: list[Any]) -> Any:
    def noting(self: LocalEngine, worker: Any, client_ids: Any, width: Any = 1) -> None:
        used.append(width)
        function(self, worker, client_ids, width)

    return noting


def test_the_seconds_of_a_run_are_those_of_all_its_parts(tmp_path: Path) -> None:
    folder = begun(tmp_path / "run", evaluation={"against": ["local"]})
    found = resume(folder, data=clients())
    again = resume(folder, data=clients())
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    spent = sum(one["seconds"] for one in rounds if one["event"] == "round")
    assert len({one["round"] for one in rounds}) == 3
    assert found.table["seconds"] > spent * 0.9 and again.table["seconds"] > spent * 0.9


@pytest.mark.parametrize(("method", "near"), [("decentralized-gossip", "method.deadline"), ("fed-sp-sc", None)])
def test_a_deadline_of_rounds_is_refused_where_there_are_none(method: str, near: str | None) -> None:
    with pytest.raises(ModeConflict, match=f"deadline=5 is given, and {method} is a protocol") as refused:
        prepare(load_recipe({**RECIPE, "method": {"name": method}, "deadline": 5.0}), clients())
    assert refused.value.nearest == near


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
    known = {"name": "fedpeptao", "score_rows": 2, "share": 1.0}
    chosen = run({**recipe, "method": known}, data=clients(), folder=tmp_path / "chosen")
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
        return Job(Fit(start, method.train, moments=moments), "a", 0, 1, 1, lambda _: [], {})

    assert alike(job({})) != alike(job({"momentum_buffer.w": torch.ones(2)}))
    assert alike(job({})) == alike(job({}))


def test_compare_asks_what_a_run_asks() -> None:
    phones, rest = {"share": 0.4, "adapter": {"rank": 2}}, {"share": 0.6}
    groups = {"groups": {"phone": phones, "rest": rest}, "adapter": {"rank": 4}}
    with pytest.raises(ConfigError, match="needs the same ranks"):
        fedllm.compare({**RECIPE, **groups, "method": "hetlora"}, ["hetlora", "fedavg"], data=clients())
