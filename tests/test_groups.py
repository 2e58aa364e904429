"""Runs whose clients have ranks or models of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.core.errors import ConfigError
from fedllm.methods.baseline.local import Local
from fedllm.recipe import load_recipe
from fedllm.run import prepare
from tests.contract.conftest import clients


def recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "g", "rounds": 2, "method": "local", "train": {"steps": 2, "batch_size": 2}, "runs": str(folder),
        "model": {"name": "toy:llama"}, "adapter": {"rank": 4}, "task": {"max_length": 64, "template": "plain"},
        "evaluation": {"against": ["base"]}, **changes,
    }  # fmt: skip


MODELS = {
    "llama": {"clients": ["c0", "c2"], "device": "server"},
    "gpt2": {"clients": ["c1", "c3"], "model": {"name": "toy:gpt2"}, "adapter": {"rank": 2}, "device": "phone"},
}


def test_clients_of_different_models_in_one_run(tmp_path: Path) -> None:
    result = fedllm.run(recipe(tmp_path, groups=MODELS), data=clients(), folder=tmp_path / "r")
    assert result.finished and result.value("federated", "loss") < result.value("base", "loss")  # type: ignore[operator]
    ground = prepare(load_recipe(recipe(tmp_path, groups=MODELS)), clients())
    worker = ground.worker(Local())
    assert worker.learner_of("c1").loaded.family == "gpt2" and worker.learner_of("c0").loaded.family == "llama"  # type: ignore[attr-defined]
    assert worker.group("c1").device == "phone" and worker.group("c1").rank == 2 and worker.group("c0").rank == 4


def test_the_same_seed_gives_the_same_bits_with_groups(tmp_path: Path) -> None:
    rows = [
        fedllm.run(recipe(tmp_path, groups=MODELS), data=clients(), folder=tmp_path / name).table["rows"]
        for name in ("a", "b")
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "fedavg", "groups": MODELS}, "fedavg needs the same models at every client"),
        ({"groups": {"a": {"share": 1.0, "adapter": {"rank": 8}}}}, "is above adapter.rank=4"),
        ({"groups": {"a": {"share": 1.0, "adapter": {"alpha": 8}}}}, "more than its rank"),
        ({"method": "fedavg", "groups": {"a": {"share": 1.0, "adapter": {"rank": 2}}}}, "needs the same ranks"),
        ({"method": "local", "groups": {"a": {"share": 1.0, "adapter": {"rank": 2}}}}, "needs the same ranks"),
        ({"groups": {"a": {"share": 0.5}}}, "sum to 0.5"),
        ({"groups": {"a": {"share": 0.5, "clients": ["c0"]}}}, "Exactly one"),
        ({"groups": {"a": {"share": 1.0, "model": {"nam": "toy:gpt2"}}}}, "nam"),
    ],
)
def test_groups_that_cannot_be_are_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        fedllm.run(recipe(tmp_path, **changes), data=clients(), folder=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_comparison_gives_every_method_the_adapter_it_asks_for(tmp_path: Path) -> None:
    """FedLoRA adds a private LoRA to the layers and pFedLoRA a bridge; the others know nothing of either."""
    keys = ["fedavg", "fedlora", "pfedlora", "local"]
    given = recipe(tmp_path, method="fedavg")
    table = fedllm.compare(given, keys, data=clients(), folder=tmp_path / "c")
    assert [row["method"] for row in table.table["rows"]] == keys
    alone = fedllm.compare(given, ["fedavg", "local"], data=clients(), folder=tmp_path / "d")
    assert table.value("fedavg") == alone.value("fedavg") and table.value("local") == alone.value("local")
