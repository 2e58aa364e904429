"""Message - parts by name, and part kinds that nobody can define twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedllm.core.errors import ConfigError
from fedllm.core.message import PARTS, Dense, Message, Owned, Part, Received, Scalars, Texts, Upload, as_part
from fedllm.core.view import View

ONE = {"w": torch.ones(1)}


def test_a_mapping_is_short_for_a_dense_part() -> None:
    received = Received(ONE, {"n": 1}, control=ONE, words=Texts(("a",)))
    assert isinstance(received.parts["params"], Dense)
    assert received.params["w"] is ONE["w"]
    assert received["control"].keys() == {"w"}
    assert received.numbers == {"n": 1}
    upload = Upload(ONE, 3, {"loss": (1, 2)}, more=ONE)
    assert upload.update.keys() == {"w"}
    assert (upload.weight, upload.metrics) == (3.0, {"loss": (1.0, 2.0)})
    assert as_part(ONE) == Dense(ONE)
    assert as_part(scalars := Scalars({})) is scalars


def test_nothing_sent_is_nothing_held() -> None:
    assert Received().parts == {}
    assert Upload().parts == {}
    assert Upload().weight == 1.0


def test_asking_for_a_part_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no part 'contrl'\. Allowed: control, params\. Did you mean 'control'\?"):
        Received(ONE, control=ONE)["contrl"]
    with pytest.raises(ConfigError, match=r"no part 'update'\. Allowed: none\."):
        _ = Upload().update
    with pytest.raises(ConfigError, match="kind 'texts' and holds no named tensors"):
        Received(words=Texts(()))["words"]


def test_an_owned_part_holds_named_tensors() -> None:
    assert Message({"p": Owned(ONE, View.whole(ONE))})["p"] == ONE


@pytest.fixture
def parts() -> Any:
    before = dict(PARTS)
    yield PARTS
    PARTS.clear()
    PARTS.update(before)


def test_a_new_kind_registers_itself(parts: dict[str, type[Part]]) -> None:
    class Bank(Part):
        kind = "bank"

    assert parts["bank"] is Bank
    with pytest.raises(NotImplementedError):
        Bank().to_wire()


def test_a_kind_is_taken_once_but_a_notebook_cell_may_run_twice(parts: dict[str, type[Part]]) -> None:
    def cell() -> type[Part]:
        class Bank(Part):
            kind = "bank"

        return Bank

    cell()
    again = cell()
    assert parts["bank"] is again
    with pytest.raises(ConfigError, match="'bank' is taken or empty"):

        class Other(Part):
            kind = "bank"

    with pytest.raises(ConfigError, match="taken or empty"):

        class Nameless(Part):
            pass

    with pytest.raises(ConfigError, match="'dense' is taken"):

        class Denser(Dense):
            pass
