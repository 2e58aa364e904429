"""Interrupt and resume equals a run that was never stopped, for every method, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.engine.folder import RunFolder
from fedllm.methods import methods
from fedllm.run import Watch
from tests.contract.conftest import clients, equal

FOUND = {key for key, kind in methods().items() if kind.__module__.startswith("fedllm.methods.")}
KEYS = sorted(FOUND - {"local", "central"})


class StopAfter(Watch):
    """Stops a run after a round, or kills it in the middle of the next one."""

    def __init__(self, leg: str, number: int, kill: bool) -> None:
        self.leg_name, self.number, self.kill = leg, number, kill

    def round(self, name: str, record: Any, values: Any) -> None:
        if name == self.leg_name and record.round == self.number:
            if self.kill:
                raise KeyboardInterrupt
            self.stop = True


def recipe(key: str, folder: Path) -> dict[str, Any]:
    train = {"steps": 2, "batch_size": 2}
    return {
        "name": "r", "rounds": 4, "method": key, "train": train, "cohort": 3, "runs": str(folder),
        "model": {"name": "toy:llama"}, "adapter": {"rank": 2}, "task": {"max_length": 64},
        "evaluation": {"every": 2, "against": ["local"]},
        "methods": {"local": {}},
    }  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_resume_gives_the_same_bits(key: str, tmp_path: Path) -> None:
    whole = fedllm.run(recipe(key, tmp_path), data=clients(), folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        stop = StopAfter("federated", 2, True)
        fedllm.run(recipe(key, tmp_path), data=clients(), folder=tmp_path / "cut", watch=stop)
    with pytest.raises(KeyboardInterrupt):
        fedllm.resume(tmp_path / "cut", data=clients(), watch=StopAfter("local", 3, True))
    resumed = fedllm.resume(tmp_path / "cut", data=clients())
    assert resumed.finished and equal(whole.state.params, resumed.state.params)
    assert all(equal(tree, resumed.state.memory[name]) for name, tree in whole.state.memory.items())
    names = ("adapter/adapter_model.safetensors",)
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    left, right = (list(RunFolder(tmp_path / n).metrics()) for n in ("whole", "cut"))
    strip = [{k: v for k, v in line.items() if k != "seconds"} for line in left]
    assert strip == [{k: v for k, v in line.items() if k != "seconds"} for line in right]
    keep = ("rows", "bytes", "tokens", "sentences")
    assert {k: whole.table[k] for k in keep} == {k: resumed.table[k] for k in keep}


def test_stop_after_the_round(tmp_path: Path) -> None:
    watch = StopAfter("federated", 2, False)
    stopped = fedllm.run(recipe("fedavg", tmp_path), data=clients(), folder=tmp_path / "s", watch=watch)
    assert not stopped.finished and stopped.state.round == 2
    assert fedllm.resume(tmp_path / "s", data=clients()).state.round == 4
