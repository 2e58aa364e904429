"""A codec under a whole run: fewer bytes, the same kinds of numbers, resume to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.core.errors import FedLLMError
from fedllm.data.federation import Federation
from tests.contract.conftest import clients, equal, public
from tests.contract.test_resume import StopAfter


def recipe(folder: Path, **codec: Any) -> dict[str, Any]:
    return {
        "name": "c", "rounds": 4, "method": "fedavg", "train": {"steps": 2, "batch_size": 2}, "runs": str(folder),
        "model": {"name": "toy:llama"}, "adapter": {"rank": 2}, "task": {"max_length": 64},
        "evaluation": {"against": []}, "codec": codec,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["int8", "topk"])
def test_fewer_bytes_and_the_same_bits_after_a_restart(kind: str, tmp_path: Path) -> None:
    plain = fedllm.run(recipe(tmp_path), data=clients(), folder=tmp_path / "plain")
    coded = fedllm.run(recipe(tmp_path, kind=kind), data=clients(), folder=tmp_path / "coded")
    assert coded.finished and coded.table["bytes"]["up"] < plain.table["bytes"]["up"]
    assert coded.table["bytes"]["down"] == plain.table["bytes"]["down"]
    assert not equal(plain.state.params, coded.state.params)
    with pytest.raises(KeyboardInterrupt):
        stop = StopAfter("federated", 2, True)
        fedllm.run(recipe(tmp_path, kind=kind), data=clients(), folder=tmp_path / "cut", watch=stop)
    assert equal(coded.state.params, fedllm.resume(tmp_path / "cut", data=clients()).state.params)


def test_what_a_method_expects_is_that_of_the_round(tmp_path: Path) -> None:
    """FedMD knows the shape of its logits only once it has prepared."""
    key = "fedmd"
    given = {**recipe(tmp_path, kind="int8", parts=["logits"]), "method": key, "model": {"name": "toy:bert"}}
    given |= {"task": {"kind": "sequence-classification", "max_length": 64}, "rounds": 2}
    data = Federation.of(clients(key), public=public(key))
    assert fedllm.run(given, data=data, folder=tmp_path / "r").finished


def test_a_part_that_does_not_exist_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(FedLLMError, match="control"):
        fedllm.run(recipe(tmp_path, kind="int8", parts=["control"]), data=clients(), folder=tmp_path / "r")
