"""fedllm attack - every cell is a run of its own, and what it means is told by the cells beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.attack import siege
from fedllm.core.errors import ConfigError, ModeConflict
from fedllm.engine.rounds import evaluate
from fedllm.run import Watch

WORDS = ("amber", "birch", "cedar", "delta")


def data() -> dict[str, Any]:
    def rows(k: int, count: int) -> list[dict[str, Any]]:
        return [{"text": f"{WORDS[(i + k) % 4]} number {i}", "label": i % 2} for i in range(count)]

    return {f"c{k}": {"train": rows(k, 6), "eval": rows(k, 4)} for k in range(8)}


def recipe(**given: Any) -> dict[str, Any]:
    return {
        "name": "siege", "rounds": 2, "method": "fedavg", "model": {"name": "toy:bert"},
        "task": {"kind": "sequence-classification", "max_length": 32}, "train": {"steps": 2, "batch_size": 2},
        "evaluation": {"against": []}, "methods": {"sign-flip": {"factor": 30.0}, "multi-krum": {"f": 2}}, **given,
    }  # fmt: skip


def test_a_method_that_needs_public_rows_is_refused_where_there_are_none(tmp_path: Path) -> None:
    """The ground of the recipe's method would not do: it needs none."""
    with pytest.raises(ConfigError, match="fedmd needs public rows"):
        siege(recipe(), [], [], ["fedmd"], data=data(), folder=tmp_path / "a")


def test_the_grid_has_every_cell_and_holds_it_to_the_right_ones(tmp_path: Path) -> None:
    found = siege(recipe(), ["sign-flip", "backdoor"], ["multi-krum"], ["fedavg"], data=data(), folder=tmp_path / "a")
    cells = {(row["attack"], row["defence"]): row for row in found.rows}
    assert set(cells) == {(a, d) for a in ("none", "sign-flip", "backdoor") for d in ("none", "multi-krum")}
    bare = cells["none", "none"]
    assert bare["lost"] == 0.0 and bare["success"] is None
    for row in found.rows:
        assert row["lost"] == pytest.approx(bare["score"] - row["score"])
    for defence in ("none", "multi-krum"):
        row = cells["backdoor", defence]
        assert 0 <= row["success"] <= 1 and 0 <= row["clean success"] <= 1
        assert cells["sign-flip", defence]["success"] is None
    assert len(cells["sign-flip", "multi-krum"]["dropped"]) >= 2
    kept = json.loads((tmp_path / "a" / "attack.json").read_text())
    assert kept["rows"] == found.rows and kept["metric"] == "accuracy"
    text = (tmp_path / "a" / "attack.md").read_text()
    assert text.count("\n") == 2 + 6 and "attacker's success" in text
    assert {file.name for file in (tmp_path / "a").glob("*.svg")} <= {"fedavg-score.svg", "fedavg-success.svg"}


def test_an_attack_on_models_of_their_own_is_scored_with_what_clients_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []

    async def watched(method: Any, state: Any, server: Any, clients: Any) -> Any:
        kept.append(bool(server.engine.worker.private.clients()))
        return await evaluate(method, state, server, clients)

    monkeypatch.setattr("fedllm.attack.evaluate", watched)
    siege(recipe(), ["backdoor"], [], ["pfedlora"], data=data(), folder=tmp_path / "a")
    assert kept and all(kept)


def test_an_interrupted_grid_goes_on_to_the_same(tmp_path: Path) -> None:
    class Stop(Watch):
        def round(self, name: str, record: Any, values: Any) -> None:
            self.stop = "sign-flip" in name

    whole = siege(recipe(), ["sign-flip"], data=data(), folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        siege(recipe(), ["sign-flip"], data=data(), folder=tmp_path / "parts", watch=Stop())
    assert siege(recipe(), ["sign-flip"], data=data(), folder=tmp_path / "parts").rows == whole.rows
    with pytest.raises(ConfigError, match="another recipe"):
        siege(recipe(rounds=3), ["sign-flip"], data=data(), folder=tmp_path / "parts")


def test_what_cannot_be_played_is_refused_before_anything_is(tmp_path: Path) -> None:
    place = tmp_path / "refused"
    with pytest.raises(ConfigError, match="Did you mean 'sign-flip'"):
        siege(recipe(), ["sign-flp"], data=data(), folder=place)
    with pytest.raises(ConfigError, match="Did you mean 'median'"):
        siege(recipe(), [], ["medan"], data=data(), folder=place)
    with pytest.raises(ConfigError, match="of its own"):
        siege(recipe(attack={"name": "sign-flip"}), [], data=data(), folder=place)
    with pytest.raises(ConfigError, match="factr"):
        siege(recipe(methods={"sign-flip": {"factr": 1}}), ["sign-flip"], data=data(), folder=place)
    assert not place.exists()
    with pytest.raises(ModeConflict, match="one meaning"):
        siege(recipe(), ["sign-flip"], [], ["flexlora"], data=data(), folder=place)
