"""What every protocol must hold: it runs from its key by `fedllm.run`, gives the same bits again, and plays on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm
from fedllm.core.card import Card
from fedllm.core.errors import FedLLMError
from fedllm.core.protocol import Protocol
from fedllm.data.federation import Federation
from fedllm.effects import checks
from fedllm.protocols import protocols
from fedllm.run import Watch
from tests.contract.conftest import FAMILIES, adapter_of, clients, equal, public, task_of

KEYS = sorted(key for key, kind in protocols().items() if kind.__module__.startswith("fedllm.protocols."))
every_protocol = pytest.mark.parametrize("key", KEYS)


def recipe(key: str, **changes: Any) -> dict[str, Any]:
    task = task_of(key)
    options = {**protocols()[key].needs, **getattr(protocols()[key], "smallest", {})}
    train = {"train": {"steps": 2, "batch_size": 2}} if "train" in protocols()[key].model_fields else {}
    return {
        "name": "p", "rounds": 3, "method": {"name": key, **options}, **train,
        "model": {"name": f"toy:{FAMILIES.get(task.kind, 'llama')}"}, "adapter": adapter_of(key),
        "task": {"kind": task.kind, "max_length": 64}, "evaluation": {"against": []}, **changes,
    }  # fmt: skip


def data(key: str) -> Federation:
    return Federation.of(clients(key), public=public(key))


class Kill(Watch):
    """Kills a run at its first checkpoint after round 1."""

    def round(self, name: str, record: Any, values: Any) -> None:
        if record.round >= 1:
            raise KeyboardInterrupt


@every_protocol
def test_runs_from_its_key_and_gives_the_same_bits_again(key: str, tmp_path: Path) -> None:
    first, again = (fedllm.run(recipe(key), data=data(key), folder=tmp_path / n) for n in ("a", "b"))
    assert first.finished and equal(first.state.params, again.state.params)
    assert first.table["rows"] == again.table["rows"] and first.table["bytes"] == again.table["bytes"]
    assert (tmp_path / "a/federated-report.json").read_text() == (tmp_path / "b/federated-report.json").read_text()
    assert (tmp_path / "a/report.html").stat().st_size > 1000


@every_protocol
def test_killed_at_a_checkpoint_it_plays_on_to_the_same_bits(key: str, tmp_path: Path) -> None:
    whole = fedllm.run(recipe(key), data=data(key), folder=tmp_path / "whole")
    try:
        fedllm.run(recipe(key), data=data(key), folder=tmp_path / "cut", watch=Kill())
        pytest.skip("it ends before its first checkpoint")
    except KeyboardInterrupt:
        resumed = fedllm.resume(tmp_path / "cut", data=data(key))
    assert resumed.finished and equal(whole.state.params, resumed.state.params)
    assert whole.state.numbers == resumed.state.numbers and whole.table["rows"] == resumed.table["rows"]


@every_protocol
def test_two_processes_end_with_the_same_model(key: str, tmp_path: Path) -> None:
    one = fedllm.run(recipe(key, cohort_width=2), data=data(key), folder=tmp_path / "one")
    two = fedllm.run(recipe(key, cohort_width=2, processes=2), data=data(key), folder=tmp_path / "two")
    assert one.state.params.keys() == two.state.params.keys() and one.table["bytes"] == two.table["bytes"]
    for name, tensor in one.state.params.items():
        assert torch.allclose(tensor, two.state.params[name], atol=2e-5), name


@every_protocol
def test_the_card_is_complete(key: str) -> None:
    kind = protocols()[key]
    assert isinstance(kind, type) and issubclass(kind, Protocol) and isinstance(kind.card, Card)
    for name in ("title", "paper", "travels", "claim"):
        assert len(getattr(kind.card, name)) > 5, name
    assert kind.card.cells and kind.__doc__ and key in checks()
    assert all(field.description for field in kind.model_fields.values()), "every option has a description"


@every_protocol
def test_the_file_is_no_second_engine(key: str) -> None:
    path = Path(__file__).parents[2] / (protocols()[key].__module__.replace(".", "/") + ".py")
    text = path.read_text()
    assert len(text.splitlines()) <= 250
    assert "import transformers" not in text and "fedllm.tasks" not in text and "fedllm.engine" not in text


@every_protocol
def test_an_unknown_option_is_refused(key: str) -> None:
    with pytest.raises((FedLLMError, ValueError), match="no_such_option"):
        protocols()[key](no_such_option=1)
