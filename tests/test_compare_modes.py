"""compare: the recipe's modes are around every method that is compared, each with an account of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.core.errors import ModeConflict

pytest.importorskip("dp_accounting")
RECIPE: dict[str, Any] = {
    "name": "modes", "rounds": 2, "method": {"name": "fedavg", "weighting": "uniform"}, "seed": 0,
    "model": {"name": "toy:llama"}, "task": {"max_length": 48, "template": "plain"}, "cohort": "all",
    "train": {"steps": 1, "batch_size": 2, "lr": 0.01},
}  # fmt: skip
PRIVACY = {"noise": 2.0, "delta": 0.01, "clip": 0.5, "key": "seed"}


def clients() -> dict[str, dict[str, list[dict[str, str]]]]:
    rows = {c: [{"instruction": f"say {c} {n}", "response": f"{c}{n}"} for n in range(8)] for c in ("a", "b", "d")}
    return {client: {"train": held[:6], "eval": held[6:]} for client, held in rows.items()}


def test_every_method_has_the_modes_and_an_account_of_its_own(tmp_path: Path) -> None:
    methods = {"fedadam": {"weighting": "uniform"}, "fedavg": {"weighting": "uniform"}}
    given = {**RECIPE, "methods": methods}
    keys = ["fedavg", "fedadam", "local", "base"]
    plain = fedllm.compare(given, keys, data=clients(), folder=tmp_path / "plain")
    private = fedllm.compare({**given, "privacy": PRIVACY}, keys, data=clients(), folder=tmp_path / "private")
    losses = [{row["method"]: row["metrics"]["loss"] for row in one.table["rows"]} for one in (plain, private)]
    for key in ("fedavg", "fedadam"):
        assert losses[0][key] != losses[1][key], f"{key} was compared without the recipe's noise"
        account = json.loads((tmp_path / "private" / f"{key}-seed0-privacy.json").read_text())
        assert [entry[0] for entry in account["ledger"]["spent"]] == ["round 1", "round 2"]
    assert losses[0]["local"] == losses[1]["local"] and losses[0]["base"] == losses[1]["base"]


def test_a_method_that_does_not_go_with_the_modes_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    folder = tmp_path / "refused"
    with pytest.raises(ModeConflict, match="flexlora"):
        fedllm.compare({**RECIPE, "privacy": PRIVACY}, ["fedavg", "flexlora"], data=clients(), folder=folder)
    assert not list(folder.rglob("metrics.jsonl")) and not list(folder.rglob("*.safetensors"))


def test_a_method_that_its_budget_ended_early_is_told(tmp_path: Path) -> None:
    budget = {**PRIVACY, "epsilon": 2.0}
    given = {**RECIPE, "privacy": budget, "rounds": 4}
    told = []
    for _ in range(2):  # again: all is there already
        found = fedllm.compare(given, ["fedavg", "base"], data=clients(), folder=tmp_path / "short")
        told.append(found.table["early"])
        assert told[-1] and all(sentence in (found.folder / "compare.md").read_text() for sentence in told[-1])
    assert told[0] == told[1] and told[0][0].startswith("fedavg with seed 0 ended after round ")
    whole = fedllm.compare({**given, "privacy": PRIVACY}, ["fedavg"], data=clients(), folder=tmp_path / "whole")
    assert whole.table["early"] == []
