"""A run that dies between the line of a round and its first checkpoint: the round is in the record once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.engine.folder import RunFolder

RECIPE: dict[str, Any] = {
    "name": "early", "rounds": 2, "method": "fedavg", "train": {"steps": 1, "batch_size": 2}, "adapter": {"rank": 2},
    "model": {"name": "toy:llama"}, "task": {"max_length": 48}, "evaluation": {"against": ["local"]},
}  # fmt: skip
ROWS = {name: {"train": [{"instruction": f"say {i}", "response": str(i)} for i in range(4)]} for name in "ab"}


def rounds(folder: Path) -> list[tuple[str, int]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["model"], line["round"]) for line in lines if line["event"] == "round"]


@pytest.mark.parametrize("leg", ["federated", "local"])
def test_the_first_round_of_a_leg_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leg: str) -> None:
    save = RunFolder.save

    def dies(self: RunFolder, name: str, checkpoint: Any) -> None:
        if name == leg:
            raise KeyboardInterrupt
        save(self, name, checkpoint)

    monkeypatch.setattr(RunFolder, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        fedllm.run(RECIPE, data=ROWS, folder=tmp_path / "run")
    assert rounds(tmp_path / "run")[-1] == (leg, 1), "it died after the line was written"
    monkeypatch.setattr(RunFolder, "save", save)
    found = fedllm.resume(tmp_path / "run", data=ROWS)
    assert rounds(tmp_path / "run") == [(name, n) for name in ("federated", "local") for n in (1, 2)]
    whole = fedllm.run(RECIPE, data=ROWS, folder=tmp_path / "whole")
    assert rounds(tmp_path / "whole") == rounds(tmp_path / "run")
    assert found.table["rows"] == whole.table["rows"] and found.table["bytes"] == whole.table["bytes"]


def test_lines_of_other_legs_stay_and_a_torn_one_goes(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run")
    for model, number in (("federated", 1), ("federated", 2), ("local", 1)):
        folder.log({"event": "round", "model": model, "round": number})
    file = tmp_path / "run" / "metrics.jsonl"
    whole = file.read_bytes()
    folder.forget("central")
    assert file.read_bytes() == whole
    with file.open("ab") as handle:
        handle.write(b'{"event": "rou')
    folder.forget("central")
    assert file.read_bytes() == whole
    folder.forget("local")
    assert rounds(tmp_path / "run") == [("federated", 1), ("federated", 2)]
    folder.forget("federated")
    assert not file.read_bytes()
