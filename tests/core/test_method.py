"""Method - typed fields, slots that default to FedAvg, cohorts, and the functions a server may ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from pydantic import Field, ValidationError

from fedllm.core import registry
from fedllm.core.card import Card
from fedllm.core.errors import ConfigError
from fedllm.core.message import Dense, Received, Upload
from fedllm.core.method import Method, on_client
from fedllm.core.protocol import Protocol
from fedllm.core.reducer import Collect, Mean, Reducers, Update
from fedllm.core.seeds import numpy_stream
from fedllm.core.state import State
from fedllm.core.train import Train
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


def plain(**fields: Any) -> Method:
    class Plain(Method):
        """Nothing overridden."""

        card = CARD
        strength: float = Field(1.0, ge=0)
        """How strong."""

    return Plain(**fields)


# -- fields -----------------------------------------------------------------------------------------------------------


def test_fields_are_typed_and_validated() -> None:
    assert plain(strength=2).strength == 2.0  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="strenght"):
        plain(strenght=2.0)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        plain(strength=-1)
    with pytest.raises(ValidationError, match="weighting"):
        plain(weighting="rows")
    with pytest.raises(ValidationError, match="frozen"):
        plain().strength = 3.0  # type: ignore[attr-defined]


def test_fields_are_documented_by_the_text_below_them() -> None:
    described = {name: field.description for name, field in type(plain()).model_fields.items()}
    assert described["strength"] == "How strong."
    assert all(described.values())


def test_key_card_private_and_adapters_are_no_fields() -> None:
    assert set(type(plain()).model_fields) == {"train", "weighting", "strength"}


# -- the default slots are federated averaging ------------------------------------------------------------------------

START = {"w": torch.tensor([1.0, 2.0])}


def test_default_slots() -> None:
    method = plain()
    state = method.init(START)
    assert state.params is START
    assert method.distribute(state, "a").params["w"] is START["w"]
    assert method.trainable("anything")
    assert method.reducer == Mean("examples")
    assert plain(weighting="uniform").reducer == Mean("uniform")
    assert method.expected(state) == {"update": START}
    update = Update({"update": Dense({"w": torch.tensor([0.5, -1.0])})}, clients=2)
    after = method.finalize(state, update)
    assert isinstance(after, State)
    assert after.params["w"].tolist() == [1.5, 1.0]
    assert START["w"].tolist() == [1.0, 2.0]


def test_default_work_sends_the_change_the_size_and_the_loss() -> None:
    class Report:
        delta, metrics = {"w": torch.ones(2)}, {"loss": (3.0, 2.0)}

    class Given:
        size = 7

        async def fit(self, start: Any, train: Train) -> Report:
            self.asked = (start, train)
            return Report()

    client, method = Given(), plain()
    with pytest.raises(StopIteration) as done:
        method.work(client, Received(START)).send(None)  # type: ignore[arg-type]
    upload = done.value.value
    assert client.asked[0]["w"] is START["w"]
    assert client.asked[1] is method.train
    assert (upload.weight, upload.metrics) == (7.0, {"loss": (3.0, 2.0)})
    assert upload.update["w"].tolist() == [1.0, 1.0]


def test_linear_is_that_of_every_reducer() -> None:
    class Half(Method):
        """One reducer that sees single uploads."""

        card = CARD

        @property
        def reducer(self) -> Reducers:
            """Two."""
            return {"update": Mean(), "texts": Collect()}

    assert plain().linear()
    assert not Half().linear()


# -- cohorts ----------------------------------------------------------------------------------------------------------

CLIENTS = [f"c{n:02d}" for n in range(20)]


def test_a_cohort_is_drawn_without_replacement_and_can_be_drawn_again() -> None:
    method = plain()
    for number in range(1, 60):
        cohort = method.cohort(number, CLIENTS, 7, numpy_stream(0, "cohort", number, 0))
        assert len(set(cohort)) == len(cohort) == 7
        assert set(cohort) <= set(CLIENTS)
        assert cohort == sorted(cohort)
        assert cohort == method.cohort(number, CLIENTS, 7, numpy_stream(0, "cohort", number, 0))


def test_cohorts_differ_from_round_to_round_and_favour_nobody() -> None:
    method = plain()
    drawn = [tuple(method.cohort(n, CLIENTS, 5, numpy_stream(3, "cohort", n, 0))) for n in range(400)]
    assert len(set(drawn)) > 380
    times = Counter(client for cohort in drawn for client in cohort)
    assert set(times) == set(CLIENTS)
    spread = 5 * (400 * 0.25 * 0.75) ** 0.5
    assert all(abs(n - 100) < spread for n in times.values())


@pytest.mark.parametrize("size", [20, 21, 1000])
def test_a_cohort_of_all(size: int) -> None:
    assert plain().cohort(1, CLIENTS, size, numpy_stream(0, "x")) == CLIENTS


def test_a_cohort_gives_plain_strings() -> None:
    """NumPy strings and ints as ids break JSON."""
    ids = numpy.array(CLIENTS)
    assert all(type(client) is str for client in plain().cohort(1, ids.tolist(), 3, numpy_stream(0, "x")))


# -- client functions -------------------------------------------------------------------------------------------------


def test_only_marked_functions_can_be_asked_for() -> None:
    class More(Method):
        """A method with one more client function."""

        card = CARD

        @on_client
        async def probe(self, client: Any, received: Received) -> Upload:
            """Asked for by name."""
            return Upload()

        async def secret(self, client: Any, received: Received) -> Upload:
            """Not marked."""
            return Upload()

        @on_client
        async def _hidden(self, client: Any, received: Received) -> Upload:
            return Upload()

    found = More.client_functions()
    assert {"work", "evaluate", "probe"} <= set(found)
    assert not {"secret", "_hidden", "finalize", "model_dump", "copy", "init"} & set(found)
    assert found["probe"] is More.probe
    assert set(type(plain()).client_functions()) == set(found) - {"probe"}


def test_a_slot_overridden_without_the_mark_can_not_be_asked_for() -> None:
    class Forgot(Method):
        """Overrides work and forgets the mark."""

        card = CARD

        async def work(self, client: Any, received: Received) -> Upload:
            """No mark."""
            return Upload()

    assert "work" not in Forgot.client_functions()
    assert "evaluate" in Forgot.client_functions()


def test_protocols_have_client_functions_too() -> None:
    class Vote(Protocol):
        """A program."""

        card = CARD
        ballots: int = 3
        """How many."""

        @on_client
        async def ballot(self, client: Any, received: Received) -> Upload:
            """One vote."""
            return Upload()

    assert set(Vote.client_functions()) == {"ballot", "evaluate"}
    assert registry.registered("protocol")["vote"] is Vote
    with pytest.raises(ValidationError):
        Vote(ballot=3)  # type: ignore[call-arg]
    with pytest.raises(NotImplementedError, match="must define play"):
        Vote().play(None, State({})).send(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "options", "name"),
    [
        ("fedadagrad", {"beta1": 0.5}, "beta1"),
        ("fedadagrad", {"beta2": 0.9}, "beta2"),
        ("profit", {"tau": 0.1}, "tau"),
        ("profit", {"server": "sgd", "convention": "paper"}, "convention"),
        ("fedmezo", {"spread": 0.2}, "spread"),
        ("fedpeptao", {"share": 0.5, "lanczos": 10}, "lanczos"),
    ],
)
def test_an_option_without_effect_is_refused(key: str, options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"method.{name}=.* would have no effect") as refused:
        find(key)(**options)
    assert f"Leave out method.{name}" in str(refused.value)
    others = {option: value for option, value in options.items() if option != name}
    assert find(key)(**others).model_copy() is not None


def test_an_option_with_effect_is_taken() -> None:
    assert find("profit")(server="adam", tau=0.1).tau == 0.1
    assert find("fedmezo")(rates="random", spread=0.2).spread == 0.2
    assert find("fedpeptao")(lanczos=10).lanczos == 10
    assert find("fedadam")(beta1=0.5, beta2=0.9).beta2 == 0.9
