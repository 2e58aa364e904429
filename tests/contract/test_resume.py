"""Interrupt and resume equals a run that was never stopped, for every method, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.data.federation import Federation
from fedllm.engine.folder import RunFolder
from fedllm.methods import methods
from fedllm.run import Watch
from tests.contract.conftest import FAMILIES, adapter_of, clients, equal, public, task_of

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
    train, task = {"steps": 2, "batch_size": 2}, task_of(key)
    return {
        "name": "r", "rounds": 4, "method": key, "train": train, "cohort": 3, "runs": str(folder),
        "model": {"name": f"toy:{FAMILIES.get(task.kind, 'llama')}"}, "adapter": adapter_of(key),
        "task": {"kind": task.kind, "max_length": 64},
        "evaluation": {"every": 2, "against": ["local"]},
        "methods": {"local": {}},
    }  # fmt: skip


def data(key: str) -> Federation:
    return Federation.of(clients(key), public=public(key))


@pytest.mark.parametrize("key", KEYS)
def test_resume_gives_the_same_bits(key: str, tmp_path: Path) -> None:
    whole = fedllm.run(recipe(key, tmp_path), data=data(key), folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        stop = StopAfter("federated", 2, True)
        fedllm.run(recipe(key, tmp_path), data=data(key), folder=tmp_path / "cut", watch=stop)
    with pytest.raises(KeyboardInterrupt):
        fedllm.resume(tmp_path / "cut", data=data(key), watch=StopAfter("local", 3, True))
    resumed = fedllm.resume(tmp_path / "cut", data=data(key))
    assert resumed.finished and equal(whole.state.params, resumed.state.params)
    assert all(equal(tree, resumed.state.memory[name]) for name, tree in whole.state.memory.items())
    saved = [sorted(path.name for path in (tmp_path / n / "adapter").glob("*")) for n in ("whole", "cut")]
    alone = key in ("local", "medvqa-pfl")  # they share no model
    assert saved[0] == saved[1] and bool(saved[0] or not whole.state.params) != alone
    for name in (n for n in saved[0] if n.endswith(".safetensors")):
        assert (tmp_path / "whole/adapter" / name).read_bytes() == (tmp_path / "cut/adapter" / name).read_bytes()
    left, right = (list(RunFolder(tmp_path / n).metrics()) for n in ("whole", "cut"))
    strip = [{k: v for k, v in line.items() if k != "seconds"} for line in left]
    assert strip == [{k: v for k, v in line.items() if k != "seconds"} for line in right]
    keep = ("rows", "bytes", "tokens", "sentences")
    assert {k: whole.table[k] for k in keep} == {k: resumed.table[k] for k in keep}


def test_stop_after_the_round(tmp_path: Path) -> None:
    watch = StopAfter("federated", 2, False)
    stopped = fedllm.run(recipe("fedavg", tmp_path), data=data("fedavg"), folder=tmp_path / "s", watch=watch)
    assert not stopped.finished and stopped.state.round == 2
    assert fedllm.resume(tmp_path / "s", data=data("fedavg")).state.round == 4
