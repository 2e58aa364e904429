"""Registry - a class is known as soon as it is defined, under one key, with a card of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fedllm.core import registry
from fedllm.core.card import TOPICS, Card
from fedllm.core.errors import ConfigError
from fedllm.core.method import Method
from fedllm.core.protocol import Protocol
from fedllm.core.registry import registered
from fedllm.methods import find, methods

CARD = Card(title="T - test", paper="none", cells=("2.1",), travels="nothing", claim="none")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    methods()  # all of them, before any test defines more
    before = {kind: dict(found) for kind, found in registry._FOUND.items()}
    yield
    for kind, found in before.items():
        registry._FOUND[kind].clear()
        registry._FOUND[kind].update(found)


def cell(claim: str = "none") -> type[Method]:
    class Notebook(Method):
        """A method typed into a notebook."""

        card = CARD.model_copy(update={"claim": claim})

    return Notebook


def test_a_class_outside_the_package_is_named_by_its_name() -> None:
    found = cell()
    assert found.key == "notebook"
    assert registered("method")["notebook"] is found


def test_a_notebook_cell_may_run_again() -> None:
    first, second = cell(), cell("better")
    assert registered("method")["notebook"] is second
    assert second is not first
    assert registered("method")["notebook"].card.claim == "better"  # type: ignore[attr-defined]


def test_a_class_inside_the_package_is_named_by_its_file() -> None:
    made = type(
        "AnyName", (Method,), {"card": CARD, "__module__": "fedllm.methods.privacy.not_there_yet", "__doc__": "x"}
    )
    assert made.key == "not-there-yet"


def test_a_class_may_name_its_own_key() -> None:
    class Odd(Method):
        """Named by hand."""

        key = "by-hand"
        card = CARD

    assert registered("method")["by-hand"] is Odd
    assert "odd" not in registered("method")


def test_a_subclass_does_not_inherit_the_key() -> None:
    class Parent(Method):
        """Has a key."""

        key = "the-parent"
        card = CARD

    class Offspring(Parent):
        """Has another."""

        card = CARD

    assert Offspring.key == "offspring"
    assert registered("method")["the-parent"] is Parent


def test_a_key_is_taken_once() -> None:
    cell()
    with pytest.raises(ConfigError, match=r"The key 'notebook' of .* is taken\. It is the method .*Notebook\. Give"):

        class Other(Method):
            """Wants the same key."""

            key = "notebook"
            card = CARD

    assert registered("method")["notebook"].__name__ == "Notebook"


def test_methods_and_protocols_share_the_keys() -> None:
    cell()
    with pytest.raises(ConfigError, match="It is the method"):

        class Clash(Protocol):
            """A protocol called as a method is."""

            key = "notebook"
            card = CARD


def test_a_card_is_needed() -> None:
    with pytest.raises(
        ConfigError, match=r"method class Cardless has no card.*'class Cardless\(\.\.\., abstract=True\)'"
    ):

        class Cardless(Method):
            """No card."""

    with pytest.raises(ConfigError, match="no card"):

        class Wrong(Method):
            """Something else called card."""

            card: Any = "a card"

    with pytest.raises(ConfigError, match="protocol class Nothing has no card"):

        class Nothing(Protocol):
            """No card."""

    assert not {"cardless", "wrong", "nothing"} & set(registered("method"))


def test_the_parents_card_is_not_a_card_of_its_own() -> None:
    """It would be listed as the parent's paper, with the parent's claim."""
    parent = cell()
    with pytest.raises(ConfigError, match="of its own"):
        type("Heir", (parent,), {"__doc__": "x"})


def test_an_abstract_class_needs_no_card_and_is_not_listed() -> None:
    class Frame(Method, abstract=True):
        """Only to be subclassed."""

    assert "frame" not in registered("method")
    assert Frame.key == ""

    class Filled(Frame):
        """Concrete."""

        card = CARD

    assert registered("method")["filled"] is Filled


def test_the_list_is_in_the_order_of_the_keys_and_a_copy() -> None:
    found = registered("method")
    assert list(found) == sorted(found)
    found.clear()
    assert registered("method") or methods()


def test_find_knows_every_method_and_the_nearest() -> None:
    assert {
        "fedavg",
        "fedprox",
        "scaffold",
        "fedavgm",
        "fedadagrad",
        "fedyogi",
        "fedadam",
        "local",
        "central",
        "fedit",
    } <= set(methods())
    assert find("fedavg").__name__ == "FedAvg"
    with pytest.raises(ConfigError, match=r"no method 'fedavgg'.*Did you mean 'fedavg(m)?'\? Run 'fedllm methods'"):
        find("fedavgg")


def test_every_method_of_the_package_has_its_file_its_topic_and_a_full_card() -> None:
    for key, method in methods().items():
        if not method.__module__.startswith("fedllm.methods."):
            continue
        _, _, topic, stem = method.__module__.split(".")
        assert topic in TOPICS
        assert key == stem.replace("_", "-") == method.key
        card = method.card
        assert all(getattr(card, name) for name in ("title", "paper", "cells", "travels", "claim"))
        assert all(field.description for field in method.model_fields.values()), key


def test_a_card_is_typed_and_frozen() -> None:
    with pytest.raises(ValueError, match="claims"):
        Card(title="t", paper="p", cells=(), travels="x", claim="y", claims="z")  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="status"):
        Card(title="t", paper="p", cells=(), travels="x", claim="y", status="done")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frozen"):
        CARD.claim = "more"
