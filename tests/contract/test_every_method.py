"""What every method must hold, found by walking the package: a new method cannot be left out."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from fedllm.core.card import TOPICS, Card
from fedllm.core.errors import FedLLMError
from fedllm.core.message import Upload
from fedllm.core.reducer import Mean, Reduction
from fedllm.core.roster import SERVER
from fedllm.core.wire import decode, encode
from fedllm.effects import checks
from fedllm.engine.crew import Crew
from fedllm.methods import methods
from tests.contract.conftest import Table, clients, equal, make, same_state

KEYS = sorted(key for key, kind in methods().items() if kind.__module__.startswith("fedllm.methods."))
PAPERLESS = {"local", "central"}
FORWARD_ONLY = {"fedbpt"}
"""Methods whose clients only measure: no optimiser step, and no training token."""
ENLARGES = {"fedpeptao"}
"""Methods that enlarge last bits (a spectrum from finite differences), and whose clients part while they ask: passes
then have other clients in them."""
every_method = pytest.mark.parametrize("key", KEYS)


@every_method
def test_runs_from_its_key_alone(key: str, learner: Any) -> None:
    table = Table(key, learner).rounds(2)
    assert [record.failed for record in table.records] == [None, None]
    assert not table.records[0].lost and not table.records[0].rejected
    counts = table.measure()
    assert sorted(counts) == sorted(clients(key))
    assert all(found["examples"] > 0 and numpy.isfinite(found["loss"]) for found in counts.values())


@every_method
def test_same_seed_same_bits_and_no_global_random_stream(key: str, learner: Any) -> None:
    torch.manual_seed(1), numpy.random.seed(1), random.seed(1)
    first = Table(key, learner, seed=3).rounds(2)
    torch.manual_seed(2), numpy.random.seed(2), random.seed(2)
    streams = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()
    again = Table(key, learner, seed=3).rounds(2)
    assert same_state(first.state, again.state)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (numpy.random.get_state()[1] == streams[1]).all() and random.getstate() == streams[2]
    assert [r.loss for r in first.records] != [r.loss for r in Table(key, learner, seed=4).rounds(2).records]


def table_prepares(table: Table) -> bool:
    """Whether clients were asked before the first round."""
    return any(request.op != "work" and request.client != SERVER for request in table.engine.requests)


@every_method
def test_clients_are_independent(key: str, learner: Any) -> None:
    """What a client gives back does not depend on who was trained before it."""
    alone = Table(key, learner, width=1)
    together = Table(key, learner, width=1)
    if key == "central":
        pytest.skip("its one client holds everybody's rows")
    alone.server.engine.engine._ids = ["c2"]  # type: ignore[attr-defined]
    alone.rounds(1), together.rounds(1)
    found = [{r.client: r.body for r in table.engine.replies if "-work-" in r.id} for table in (alone, together)]
    if table_prepares(together):
        pytest.skip("everybody is asked before the first round, and the answers decide what is sent")
    assert found[0]["c2"] == found[1]["c2"]


@every_method
def test_one_by_one_equals_one_pass(key: str, learner: Any) -> None:
    one, many = Table(key, learner, width=1).rounds(2), Table(key, learner, width=4).rounds(2)
    for name, tensor in one.state.params.items():
        assert torch.allclose(tensor, many.state.params[name], atol=2e-5), name
    a, b = one.measure(), many.measure()
    assert all(abs(a[c]["loss"] - b[c]["loss"]) < 1e-3 for c in a)


@every_method
def test_two_processes_give_the_bits_of_one(key: str, learner: Any, crew: Crew) -> None:
    """Two clients in each of their passes, as in the one of the other table."""
    crew.names[id(learner)] = key
    one, two = Table(key, learner, width=2), Table(key, learner, width=2)
    two.worker.crew = crew
    one.rounds(2), two.rounds(2)
    if key in ENLARGES:
        assert all(torch.allclose(t, two.state.params[n], atol=2e-5) for n, t in one.state.params.items())
    else:
        assert same_state(one.state, two.state)
        assert [r.loss for r in one.records] == [r.loss for r in two.records]
    assert one.server.meter.tokens == two.server.meter.tokens
    a, b = one.measure(), two.measure()
    assert all(abs(a[c]["loss"] - b[c]["loss"]) < 1e-3 for c in a)


@every_method
def test_measuring_changes_nothing(key: str, learner: Any) -> None:
    plain, measured = Table(key, learner).rounds(1), Table(key, learner).rounds(1)
    weights = {n: p.clone() for n, p in learner.loaded.model.named_parameters()}
    assert measured.measure() == measured.measure()
    assert same_state(plain.rounds(1).state, measured.rounds(1).state)
    assert equal(weights, dict(learner.loaded.model.named_parameters()))


@every_method
def test_the_meter_counts_what_travels(key: str, learner: Any) -> None:
    table = Table(key, learner).rounds(2)
    meter = table.server.meter
    assert meter.total("down") == sum(len(request.body) for request in table.engine.requests)
    assert meter.total("up") == sum(len(reply.body) for reply in table.engine.replies)
    assert meter.total("up") == sum(record.bytes_up for record in table.records)
    assert [meter.tokens > 0, meter.steps > 0] == [key not in FORWARD_ONLY] * 2


@every_method
def test_nothing_private_is_uploaded(key: str, learner: Any) -> None:
    """No upload holds a tensor of the private store, and no name declared as private is a part."""
    table = Table(key, learner).rounds(2)
    kept = [
        t
        for client in table.worker.private.clients()
        for value in table.worker.private.open(client).values()
        if isinstance(value, dict)
        for t in value.values()
        if isinstance(t, torch.Tensor) and t.numel() > 4 and bool((t != 0).any())
    ]
    for reply in table.engine.replies:
        for part in decode(reply.body).parts.values():
            for tensor in part.to_wire()[0].values():
                assert not any(t.shape == tensor.shape and torch.equal(t, tensor) for t in kept)


@every_method
def test_a_linear_reducer_is_linear(key: str, learner: Any) -> None:
    method = make(key)
    if not method.linear():
        pytest.skip("its reducer does not claim to be linear")
    reducers = {"update": method.reducer} if isinstance(method.reducer, Mean) else method.reducer
    for reducer in reducers.values():
        draw = torch.Generator().manual_seed(0)
        a, b = ([torch.randn(5, generator=draw) for _ in range(3)] for _ in range(2))

        def reduced(rows: list[torch.Tensor], reducer: Any = reducer) -> torch.Tensor:
            reduction = Reduction(reducer)
            for number, row in enumerate(rows):
                reduction.add(str(number), Upload({"x": row}, weight=number + 1.0))
            return reduction.result(3).params["x"]

        total = reduced([x + y for x, y in zip(a, b, strict=True)])
        assert torch.allclose(total, reduced(a) + reduced(b), atol=1e-6)


@every_method
def test_no_answers_leave_the_state_alone(key: str, learner: Any) -> None:
    table = Table(key, learner).rounds(1)
    before = table.state
    table.engine.change = lambda reply: dataclasses.replace(reply, body=None, error="unplugged")
    table.rounds(1)
    record = table.records[-1]
    assert record.failed and record.used == 0 and {entry["reason"] for entry in record.lost} == {"unplugged"}
    assert same_state(dataclasses.replace(table.state, round=before.round), before)
    table.engine.change = lambda reply: reply
    assert table.rounds(1).records[-1].failed is None


def changed(part: Any, change: Any) -> Any:
    """A part with all its floating-point tensors changed; texts and numbers stay."""
    tensors, facts = part.to_wire()
    return type(part).from_wire({n: change(t) if t.is_floating_point() else t for n, t in tensors.items()}, facts)


@every_method
def test_a_poisoned_upload_is_rejected_and_the_rest_counts(key: str, learner: Any) -> None:
    if key in ("local", "central"):
        pytest.skip("uploads no tensors, or has one client only")
    table, without = Table(key, learner), Table(key, learner)

    def poison(reply: Any) -> Any:
        upload = decode(reply.body)
        if reply.client != "c1" or "-work-" not in reply.id or not isinstance(upload, Upload):
            return reply
        upload.parts.update({n: changed(part, lambda t: t * float("nan")) for n, part in upload.parts.items()})
        return dataclasses.replace(reply, body=encode(upload))

    table.engine.change = poison
    without.engine.change = lambda r: (
        dataclasses.replace(r, body=None, error="gone") if r.client == "c1" and "-work-" in r.id else r
    )
    table.rounds(1), without.rounds(1)
    assert {entry["client"] for entry in table.records[0].rejected} == {"c1"}
    assert same_state(table.state, without.state)
    assert "c1" not in table.worker.private.clients()


@every_method
def test_garbage_and_wrong_shapes_are_rejected(key: str, learner: Any) -> None:
    if key in ("local", "central"):
        pytest.skip("uploads no tensors, or has one client only")

    def wrong(reply: Any) -> Any:
        if "-work-" not in reply.id:
            return reply
        if reply.client == "c0":
            return dataclasses.replace(reply, body=b"not a message at all")
        if reply.client == "c1":
            upload = decode(reply.body)
            twice = {
                n: changed(part, lambda t: torch.cat([t, t]) if t.dim() else torch.stack([t, t]))
                for n, part in upload.parts.items()
            }
            upload.parts.update(twice)
            return dataclasses.replace(reply, body=encode(upload))
        return reply

    table = Table(key, learner)
    table.engine.change = wrong
    record = table.rounds(1).records[0]
    assert {entry["client"] for entry in record.rejected} == {"c0", "c1"}
    turns = len(record.rejected) // 2  # a method may ask the same clients several times in a round
    assert len(record.rejected) == 2 * turns and record.used == 2 * turns and record.failed is None


@every_method
def test_unsampled_clients_cost_nothing(key: str, learner: Any) -> None:
    if key == "central":
        pytest.skip("its one client holds everybody's rows")
    table = Table(key, learner).rounds(1, cohort=1)
    asked = {request.client for request in table.engine.requests if request.op == "work"}
    assert len(asked) == 1
    if not table_prepares(table):
        assert {client for client, split in table.worker._examples if split != "public"} <= asked
    assert set(table.worker.private.clients()) <= asked


@every_method
def test_the_card_is_complete_and_the_map_has_its_place(key: str) -> None:
    kind = methods()[key]
    assert isinstance(kind.card, Card)
    for name in ("title", "paper", "travels", "claim"):
        assert len(getattr(kind.card, name)) > 5, name
    assert kind.card.cells and kind.__doc__
    topic = kind.__module__.split(".")[2]
    assert topic in TOPICS
    assert all(field.description for field in kind.model_fields.values()), "every option has a description"
    if key not in PAPERLESS:
        assert key in checks(), "its effect has no check"


@every_method
def test_the_file_is_short_and_never_imports_another_method(key: str) -> None:
    path = Path(methods()[key].__module__.replace(".", "/") + ".py")
    text = (Path(__file__).parents[2] / path).read_text()
    assert len(text.splitlines()) <= 140
    assert "import transformers" not in text and "fedllm.tasks" not in text and "fedllm.engine" not in text


@every_method
def test_an_unknown_option_is_refused(key: str) -> None:
    with pytest.raises((FedLLMError, ValueError), match="no_such_option"):
        methods()[key](no_such_option=1)
